"""A plan as text for people."""

from clip_jax.common.formatting import aligned, format_seconds
from clip_jax.plan.chips import GIB
from clip_jax.plan.make import Host, Memory, Plan
from clip_jax.plan.step_cost import Step


def format_plan(plan: Plan, suggestions: list[str] | None = None) -> str:
    """Formats the whole plan, ready to print."""
    blocks = [_head(plan), _memory(plan)]
    if plan.step:
        blocks += [_speed(plan, plan.step), _collectives(plan.step), _parts(plan.step)]
        if plan.step.kernels:
            blocks.append(_kernels(plan.step))
        if plan.step.top:
            blocks.append(_top(plan.step))
        blocks.append("\n".join(f"* {note}" for note in plan.step.notes))
    if suggestions:
        blocks.append("What would fit:\n" + "\n".join(f"  {line}" for line in suggestions))
    return "\n\n".join(blocks)


def _head(plan: Plan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1"
    where = f"{plan.slices} slices of {plan.topology}" if plan.slices > 1 else plan.topology
    devices = f" ({plan.devices:,} devices)" if plan.devices > plan.chips else ""
    accumulated = f" in {plan.accum_steps} micro-batches" if plan.accum_steps > 1 else ""
    return (
        f"{plan.model}, {plan.batch_size:,} pairs a step{accumulated}, on {where}: "
        f"{plan.chips:,} chips{devices}, mesh {mesh}\n"
        f"remat {plan.remat}; loss {plan.loss}; compiled in {format_seconds(plan.compile_seconds)}"
    )


def _memory(plan: Plan) -> str:
    memory = plan.memory
    rows = [
        ("parameters", memory.parameters),
        ("optimiser state", memory.optimizer),
        ("other state", memory.other),
        ("batch", memory.batch),
        ("padding of these", memory.padding),
        ("temporaries", memory.temporaries),
        ("results beside the state", memory.results),
        ("program", memory.code),
    ]
    lines = [f"Memory of a {unit(plan)}, GiB"]
    lines += [f"  {name:<28}{gib(size):>9}" for name, size in rows if size is None or size >= 2**20]
    return "\n".join([*lines, f"  {'in all':<28}{gib(memory.peak):>9}  {_verdict(plan, memory)}"])


def unit(plan: Plan) -> str:
    """Names what the figures of memory and step are of."""
    return "chip" if plan.devices == plan.chips else "device"


def _verdict(plan: Plan, memory: Memory) -> str:
    of = f"of {memory.available / GIB:.2f}"
    if plan.fits and memory.peak is not None:
        left = memory.available - memory.peak
        return f"{of}: FITS, {left / GIB:.2f} left ({left / memory.available:.0%})"
    return f"{of}: DOES NOT FIT, {plan.missing / GIB:.2f} too much"


def gib(size: float | None) -> str:
    """Formats bytes in GiB; "?": not known."""
    return "?" if size is None else f"{size / GIB:.2f}"


def _speed(plan: Plan, step: Step) -> str:
    assert plan.examples_per_second is not None
    assert plan.run_seconds is not None
    waited = step.seconds - step.compute_seconds
    span = max(step.compute_seconds, step.network_seconds)
    both = max(step.compute_seconds + step.network_seconds, step.seconds)
    rate = plan.examples_per_second
    return "\n".join(
        [
            f"Step {_ms(step.seconds)} ms predicted ({_ms(span)} if all overlapped, {_ms(both)} if "
            "nothing did)",
            f"  computation             {_ms(step.compute_seconds):>10} ms",
            f"  collectives             {_ms(step.network_seconds):>10} ms, "
            f"{_ms(max(waited, 0))} waited for",
            f"  model operations        {step.model_flops / 1e12:>10.3f} TFLOP a {unit(plan)}: "
            f"MFU {step.mfu:.3f}",
            f"  executed operations     {step.hardware_flops / 1e12:>10.3f} TFLOP a {unit(plan)}: "
            f"{step.hfu:.3f} of the peak",
            f"  traffic to HBM          {step.bytes / GIB:>10.1f} GiB a {unit(plan)}",
            f"  {rate:,.0f} pairs/s, {rate / plan.chips:,.1f} per chip",
            f"  {plan.duration} of {plan.examples:,.0f} examples: {plan.total_steps:,} steps, "
            f"{format_seconds(plan.run_seconds)}, "
            f"{plan.run_seconds * plan.chips / 3600:,.0f} chip-hours",
            _host(plan.host),
        ]
    )


def _host(host: Host) -> str:
    """Formats the input of a host, and whether it suffices."""
    needed = f"{host.needed_cores:,.1f} of about {host.cores} cores at {host.images_per_core:,.0f}"
    line = f"  input: {host.images:,.0f} images/s a host, {needed} images/s each"
    return f"{line}: THE CHIPS WAIT FOR THEIR INPUT" if host.starves else line


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds >= 0.01 else f"{seconds * 1e3:.2f}"


def _collectives(step: Step) -> str:
    if not step.collectives:
        return "Collectives: none"
    rows = [("Collectives of a step", "over", "number", "MiB a chip", "ms", "")]
    for x in step.collectives:
        over = x.axes + (" (DCN)" if x.network == "dcn" else "")
        how = "overlapped" if x.overlapped else "waited for"
        mib = f"{x.bytes / 2**20:,.1f}"
        rows.append((f"  {x.kind}", over, f"{x.count:,.0f}", mib, f"{x.seconds * 1e3:.2f}", how))
    return aligned(rows, "<<>>><")


def _parts(step: Step) -> str:
    """Formats the parts, with the time that their matrix products and their traffic need alone."""
    head = "Where the time goes", "ms", "fraction", "TFLOP", "of peak", "GiB", "matrix ms", "HBM ms"
    rows = [head]
    for part in step.parts:
        if part.seconds >= 0.003 * step.compute_seconds:
            used = f"{part.matrix_seconds / part.seconds:.2f}" if part.flops else ""
            work = f"{part.flops / 1e12:.3f}" if part.flops else ""
            least = f"{part.matrix_seconds * 1e3:.2f}" if part.flops else ""
            fraction = f"{part.seconds / step.compute_seconds:.1%}"
            cells = f"{part.seconds * 1e3:.2f}", fraction, work, used, f"{part.bytes / GIB:.2f}"
            rows.append((f"  {part.name}", *cells, least, f"{part.hbm_seconds * 1e3:.2f}"))
    return aligned(rows, "<>>>>>>>")


def _kernels(step: Step) -> str:
    """Formats the kernels: cycles and bundles of a call, and the units that they fill most."""
    rows = [("Pallas kernels", "runs", "ms", "cycles", "bundles", "TFLOP", "MiB", "slots", "part")]
    for x in step.kernels:
        cycles = bundles = slots = "?"
        if x.timing and x.timing.cycles is not None:
            cycles = f"{'' if x.timing.simulated else '~'}{x.timing.cycles:,.0f}"
            bundles = f"{x.timing.bundles:,.0f}" if x.timing.bundles else "?"
            fullest = sorted(x.timing.slots.items(), key=lambda item: -item[1])[:3]
            slots = ", ".join(f"{name} {used:.2f}" for name, used in fullest)
        work = f"{x.flops / 1e12:.4f}" if x.flops else ""
        cells = f"{x.times:,.0f}", f"{x.seconds * 1e3:.2f}", cycles, bundles, work
        rows.append((f"  {x.name}", *cells, f"{x.bytes / 2**20:,.1f}", slots, x.part))
    return aligned(rows, "<>>>>>><<")


def _top(step: Step) -> str:
    rows = [("Longest instructions", "runs", "ms", "TFLOP", "GiB", "origin")]
    for name, origin, times, seconds, flops, size in step.top:
        place = "/".join(origin.split("/")[1:])[-90:]
        work = f"{flops / 1e12:.3f}" if flops else ""
        cells = f"{times:,.0f}", f"{seconds * 1e3:.2f}", work, f"{size / GIB:.2f}", place
        rows.append((f"  {name}", *cells))
    return aligned(rows, "<>>>><")
