"""Distillation: from models that run beside the student, and from what the data keep."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
import reference
import tiny_data
import tiny_run
import tiny_weights
from PIL import Image
from shards import write_tar
from tiny_plan import V5E_8, needs_compiler, tiny_config

from clip_jax import api, sharding
from clip_jax.data import tokenizer
from clip_jax.embed import cli
from clip_jax.errors import UserError
from clip_jax.plan import make
from clip_jax.training import program, run, teachers, train, validation
from clip_jax.weights.model import Weights

CONTEXT = 24  # of tiny runs


def teacher(kind: str = "vit", **size) -> Weights:
    """A random model that reads the batches of tiny runs."""
    shape = dataclasses.replace(
        tiny_weights.SIZES[kind],
        **{"context_length": CONTEXT, "image_layers": (1,), "text_layers": 1, **size},
    )
    return tiny_weights.make(kind, shape)


@pytest.fixture
def named(monkeypatch):
    """Models by name, in place of files."""
    found: dict[str, Weights] = {}
    monkeypatch.setattr(teachers.weights, "open", found.__getitem__)
    return found


def distilling(**overrides):
    return tiny_run.config({"loss.distillation": 0.75, **overrides})


# ---- Running teachers --------------------------------------------------------------------------


def test_a_teacher_sees_the_images_as_it_would_alone():
    """Resized as Pillow does, up and down, by either filter; it clips once more on the way."""
    images = np.random.default_rng(0).integers(80, 176, (3, 24, 24, 3), np.uint8)
    for side, filter_, of_pillow in (
        (16, "bicubic", Image.Resampling.BICUBIC),
        (40, "bicubic", Image.Resampling.BICUBIC),
        (16, "bilinear", Image.Resampling.BILINEAR),
    ):
        size = teacher(image_size=side, image_filter=filter_).size
        got = np.asarray(jax.jit(teachers.resize, static_argnums=1)(images, size))
        want = [Image.fromarray(image).resize((side, side), of_pillow) for image in images]
        assert got.dtype == np.uint8
        assert np.abs(got.astype(int) - np.stack(want)).max() <= 1  # it rounds once more as well
    same = teachers.resize(images, teacher(image_size=24).size)
    assert same is images


@pytest.mark.parametrize("accum_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_embeddings_are_those_of_the_teachers(accum_steps, named, mesh8):
    """Teachers of another width and resolution than the student, on a mesh, in pieces or not."""
    named |= {"a": teacher(), "b": teacher("gelu", image_mean=(0.5,) * 3, image_size=16)}
    settings = {"loss.teachers": "a, b", "accum_steps": accum_steps, "mesh.fsdp": 2}
    config = distilling(**settings, **{"data.augment.flip": 0.5})
    mesh, net = program.make_mesh_and_net(config)
    tokens = tokenizer.create("openai", CONTEXT)
    opened = teachers.open_teachers(config, net.size, tokens)
    built = program.build(config, 1000, teacher_widths=[each.size.embed_dim for each in opened])
    running = teachers.Teachers(opened, built)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 16, 16, 3), np.uint8),
        "tokens": tokens([f"number {i}" for i in range(16)]),
    }
    split = sharding.batch_sharding(mesh)
    step = jax.device_put(np.int32(3), sharding.replicated(mesh))
    found = running(jax.device_put(batch, split), step)
    assert {name: found[name].shape for name in built.batch} == {
        name: like.shape for name, like in built.batch.items()
    }
    flipped = 0
    for number, each in enumerate(opened):
        logit_scale = float(each.tensors.read("params/logit_scale"))
        assert running.scales[number] == pytest.approx(math.exp(logit_scale))
        alone = api.Model.from_weights(each)
        images, texts = (
            np.asarray(found[f"teacher/{number}/{side}"]) for side in ("image", "text")
        )
        np.testing.assert_allclose(
            texts, alone.encode_text([f"number {i}" for i in range(16)]), atol=1e-5
        )
        as_it_is = alone.encode_image(np.asarray(teachers.resize(batch["image"], each.size)))
        mirrored = alone.encode_image(
            np.asarray(teachers.resize(batch["image"][:, :, ::-1].copy(), each.size))
        )
        errors = [np.abs(images - x).max(axis=1) for x in (as_it_is, mirrored)]
        assert (np.minimum(*errors) < 1e-5).all()
        flipped += (errors[1] < errors[0]).sum()
    assert 8 <= flipped <= 24  # of 32: the augmented images are what it sees


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "captioning"}, "was trained for captioning.*objective=contrastive"),
        ({"context_length": 10}, r"captions of 10 tokens, the student of 24.*context_length=10"),
        ({"text_causal": False, "context_length": 32}, "captions of 32 tokens, the student of 24"),
    ],
)
def test_teachers_that_cannot_read_the_batch(named, changes, message):
    named["a"] = dataclasses.replace(teacher(), size=dataclasses.replace(teacher().size, **changes))
    config, tokens = distilling(**{"loss.teachers": "a"}), tokenizer.create("openai", CONTEXT)
    with pytest.raises(UserError, match=f"loss.teachers names a: .*{message}"):
        teachers.open_teachers(config, program.make_mesh_and_net(config)[1].size, tokens)


def test_a_teacher_of_a_longer_context_needs_no_padding(named):
    named["a"] = teacher(context_length=77)
    config, tokens = distilling(**{"loss.teachers": "a"}), tokenizer.create("openai", CONTEXT)
    assert teachers.open_teachers(config, program.make_mesh_and_net(config)[1].size, tokens)


def test_other_faults_of_teachers(named, tmp_path, monkeypatch):
    tokens = tokenizer.create("openai", CONTEXT)
    named["a"] = teacher("siglip", vocab_size=60)
    size = program.make_mesh_and_net(distilling())[1].size
    config = distilling(**{"loss.teachers": "a"})
    with pytest.raises(UserError, match=r"names a: its tokenizer is not known.*teacher_keys"):
        teachers.open_teachers(config, size, tokens)
    named["a"] = teacher()  # of one head
    config = distilling(**{"loss.teachers": "a", "mesh.tensor": 2})
    with pytest.raises(UserError, match=r"names a: mesh\.tensor=2 does not divide text_heads 1"):
        teachers.open_teachers(config, size, tokens)
    monkeypatch.undo()
    config = distilling(**{"loss.teachers": str(tmp_path / "none")})
    with pytest.raises(UserError, match=r"loss\.teachers names .*none: There is no model"):
        teachers.open_teachers(config, size, tokens)


# ---- Settings ----------------------------------------------------------------------------------

STORED = {"data.source.teacher_keys": "digits+digits:10"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss.distillation": 1.5}, r"loss\.distillation is 1\.5, and must be from 0 to 1"),
        ({"loss.distillation": 0.5}, "there is no teacher: name models in loss.teachers"),
        ({"loss.teachers": "a,b"}, "names a, b, but loss.distillation is 0"),
        (STORED, "teacher_keys names teachers, but loss.distillation is 0"),
        ({**STORED, "loss.distillation": 1.0}, r"teacher_scales is \(\).*each of the 1 teacher"),
        (
            {"loss.distillation": 1.0, "loss.teachers": "a,b", "loss.teacher_scales": (100.0,)},
            r"teacher_scales is \(100\.0,\).*each of the 2 teacher",
        ),
        (
            {"loss.distillation": 1.0, "loss.teachers": "a", "loss.teacher_scales": (0.0,)},
            "must be of positive numbers",
        ),
        (
            {**STORED, "loss.distillation": 1.0, "data.captions": 2},
            "data.captions is 2, but the data keep a teacher's embedding of one caption",
        ),
        (
            {**STORED, "loss.distillation": 1.0, "data.source.text_key": "a,b"},
            "text_key is 'a,b'.*name its field alone",
        ),
        (
            {**STORED, "loss.distillation": 1.0, "data.source.type": "synthetic"},
            "synthetic data have no such fields",
        ),
        (
            {"loss.distillation": 1.0, "loss.teachers": "a", "objective": "captioning"},
            "loss.distillation is 1.0, but objective=captioning takes 0",
        ),
        ({"data.source.teacher_keys": "digits"}, "is not understood"),
    ],
)
def test_settings_that_cannot_go_together(settings, message):
    with pytest.raises(UserError, match=message):
        validation.validate(tiny_run.config(settings))


@pytest.mark.slow
@needs_compiler
def test_the_plan_says_that_it_leaves_teachers_out():
    settings = {"loss.distillation": 0.75, "loss.teachers": "nobody/at-all"}
    plan = make.make_plan(tiny_config(**settings), V5E_8, examples=3200)
    assert any("1 teacher(s) of loss.teachers are left out" in note for note in plan.step.notes)


# ---- Whole runs --------------------------------------------------------------------------------

RUNNING = {"loss.distillation": 0.75, "duration": "8 steps", "checkpoint.every": "4 steps"}
RUNNING |= {"eval.every": "8 steps"}


def distil(workdir, **overrides):
    teacher_run = str(tiny_run.finished())
    config = tiny_run.config({**RUNNING, "loss.teachers": teacher_run, **overrides})
    validation.validate(config)
    with tiny_run.compile_once():
        train.train(config, workdir)
    return [row["train/loss"] for row in tiny_run.read_rows(workdir) if "train/loss" in row]


@pytest.fixture
def shard(tmp_path):
    members = []
    for i in range(40):
        record = {"caption": f"picture {i}", "alt": f"number {i}", "score": i % 4}
        image = tiny_data.encoded(tiny_data.picture(i))
        members += [(f"{i:02}.png", image), (f"{i:02}.json", json.dumps(record).encode())]
    write_tar(tmp_path / "0.tar", members)
    return tmp_path / "0.tar"


@pytest.fixture(scope="module")
def distilled():
    workdir = tiny_run.folder() / "distilled"
    distil(workdir)
    return workdir


@pytest.mark.slow
def test_the_first_loss_is_that_of_numpy(tmp_path):
    """With a teacher that runs beside, and one that the data keep."""
    overrides = {**STORED, "loss.teacher_scales": (10.0, 50.0), "data.crop": "center"}
    loss, *_ = distil(tmp_path / "run", **overrides, **{"duration": "1 steps"})
    config = tiny_run.config({**RUNNING, **overrides, "loss.teachers": str(tiny_run.finished())})
    run_ = run.prepare(config, tmp_path / "other")
    batch = next(iter(run.open_data(run_, 0)))
    variables = run_.program.init().variables
    images, texts, logit_scale = run_.net.apply(variables, batch["image"], batch["tokens"])
    alone = api.load(tiny_run.finished())
    beside = alone.net.apply(alone.variables, batch["image"], batch["tokens"])[:2]
    kept = batch["teacher/0/image"], batch["teacher/0/text"]
    theirs = [(*kept, math.log(10)), (*beside, math.log(50))]
    own, *_ = reference.softmax_loss(images, texts, logit_scale)
    divergence, *_ = reference.distillation_loss(images, texts, logit_scale, theirs)
    assert loss == pytest.approx(0.25 * own + 0.75 * divergence, rel=1e-5)


@pytest.mark.slow
def test_resuming_ends_in_the_same_bits(distilled, tmp_path):
    copy = shutil.copytree(distilled, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints/8")
    distil(copy)
    assert tiny_run.learned(copy) == tiny_run.learned(distilled)
    tiny_run.assert_same_checkpoint(copy, distilled, 8)


@pytest.mark.slow
def test_in_pieces_by_a_ring_on_another_mesh(distilled, tmp_path):
    overrides = {"accum_steps": 2, "loss.method": "ring", "mesh.fsdp": 2, "mesh.tensor": 2}
    losses = distil(tmp_path / "run", **overrides)
    rows = tiny_run.read_rows(distilled)
    wanted = [row["train/loss"] for row in rows if "train/loss" in row]
    np.testing.assert_allclose(losses, wanted, rtol=1e-3)
    np.testing.assert_allclose(losses[0], wanted[0], rtol=1e-5)


@pytest.mark.slow
def test_two_captions_an_image_and_weights(tmp_path, shard):
    """The teacher embeds both captions of each image."""
    losses = distil(
        tmp_path / "run",
        **{
            "data.source.type": "tar",
            "data.source.path": str(shard),
            "data.source.text_key": "caption,alt",
            "data.source.weight_key": "score",
            "data.captions": 2,
            "loss.name": "sigmoid",
        },
    )
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_what_embed_writes_beside_the_pictures_is_a_teacher(tmp_path):
    """It is what the teacher says of the same pixels."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = ["image,caption"]
    for i in range(40):
        (pictures / f"{i:02}.png").write_bytes(tiny_data.encoded(tiny_data.picture(i)))
        lines.append(f"{i:02}.png,number {i}")
    (pictures / "captions.csv").write_text("\n".join(lines) + "\n")
    model = str(tiny_run.finished())
    cli.main([f"--model={model}", str(pictures), f"--out={pictures}", "--of=both"])
    overrides = {
        "data.source.type": "folder",
        "data.source.path": f"{pictures}/part-*.parquet",
        "data.source.image_key": "key",
        "data.source.text_key": "captions",
        "data.source.teacher_keys": "image_embed+text_embed:16",
        "data.crop": "center",
        "loss.teacher_scales": (50.0,),
    }
    config = tiny_run.config({**RUNNING, **overrides})
    validation.validate(config)
    run_ = run.prepare(config, tmp_path / "run")
    batch = next(iter(run.open_data(run_, 0)))
    alone = api.load(model)
    beside = alone.net.apply(alone.variables, batch["image"], batch["tokens"])[:2]
    for name, embeds in zip(("teacher/0/image", "teacher/0/text"), beside):
        np.testing.assert_allclose(batch[name], embeds, atol=1e-3)  # stored in float16
