"""The order of the modules: imports go one way, and all of them load."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from clip_jax.configs import default
from clip_jax.errors import UserError
from clip_jax.training import validation

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path for folder in ("clip_jax", "configs") for path in (ROOT / folder).rglob("*.py"))

# Each layer may import those below it and, as long as no circle comes of it, its own.
LAYERS = (
    ("main", "clip_jax.__main__"),
    ("clip_jax.curation", "clip_jax.plan", "clip_jax.status", "clip_jax.sweep"),
    ("clip_jax.training",),
    ("clip_jax.evaluate", "clip_jax.export", "clip_jax.search"),
    ("clip_jax.embed",),
    ("clip_jax.api",),
    ("clip_jax.weights",),
    ("clip_jax.checkpoint", "clip_jax.checksums", "clip_jax.data"),
    ("clip_jax.state", "clip_jax.common"),
    (
        "clip_jax.models",
        "clip_jax.losses",
        "clip_jax.optim",
        "clip_jax.choices",
        "clip_jax.sharding",
        "clip_jax.storage",
        "clip_jax.errors",
        "clip_jax.configs",
    ),
)
# What may be imported of clip_jax from within these, themselves aside.
LEAVES = {
    "clip_jax": set(),  # loads on first use
    "clip_jax.errors": set(),
    "clip_jax.configs": {"clip_jax.choices", "clip_jax.errors", "clip_jax.models"},
    "clip_jax.sharding": {"clip_jax.errors"},
    "clip_jax.choices": set(),
    "clip_jax.losses": {"clip_jax.choices", "clip_jax.errors"},
    "clip_jax.optim": {"clip_jax.errors", "clip_jax.sharding"},
    "clip_jax.models": {"clip_jax.choices", "clip_jax.errors", "clip_jax.sharding"},
    "clip_jax.storage": {"clip_jax.errors"},
    "clip_jax.common": {"clip_jax.configs", "clip_jax.errors", "clip_jax.storage"},
    "clip_jax.data": {
        "clip_jax.choices",
        "clip_jax.common",
        "clip_jax.configs",
        "clip_jax.errors",
        "clip_jax.storage",
    },
}


def module_name(path: pathlib.Path) -> str:
    """The name of a module; the configs count as the part of clip_jax that they are in a wheel."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("clip_jax", *parts) if parts[0] == "configs" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path) -> set[str]:
    """Full names of everything imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            # "from clip_jax import losses" imports a module, "from clip_jax.errors import ..." a
            # name in one: in either case the unit below is the same.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit(name: str) -> str:
    """The layers' name of what an import brings: "clip_jax.data.order" is clip_jax.data."""
    return ".".join(name.split(".")[:2]) if name.startswith("clip_jax.") else name.split(".")[0]


def own_imports(path: pathlib.Path) -> set[str]:
    """Units of this project that a file imports, its own aside."""
    found = {unit(name) for name in imports(path)}
    ours = {name for name in found if name.split(".")[0] in ("clip_jax", "main")}
    return ours - {unit(module_name(path))}


def level(name: str) -> int:
    """0 is the top."""
    found = [i for i, layer in enumerate(LAYERS) if name in layer]
    assert found, f"{name} has no place in the layers"
    return found[0]


@pytest.mark.parametrize("path", [ROOT / "main.py", *FILES], ids=module_name)
def test_imports_go_one_way(path: pathlib.Path):
    name = unit(module_name(path))
    if name == "clip_jax":
        assert not own_imports(path)
        return
    for imported in own_imports(path):
        assert level(imported) >= level(name), f"{module_name(path)} imports {imported}"


def without_circles(depends: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns the nodes that remain after repeatedly removing those without dependencies."""
    depends = dict(depends)
    while free := [name for name, needs in depends.items() if not needs & depends.keys()]:
        for name in free:
            del depends[name]
    return depends


def test_no_circles_between_packages():
    depends: dict[str, set[str]] = {}
    for path in FILES:
        depends.setdefault(unit(module_name(path)), set()).update(own_imports(path))
    assert not without_circles(depends)


def test_no_circles_between_files():
    names = {module_name(path) for path in FILES}
    depends = {}
    for path in FILES:
        found = {name if name in names else name.rpartition(".")[0] for name in imports(path)}
        depends[module_name(path)] = found & names
    assert not without_circles(depends)


@pytest.mark.parametrize("name", LEAVES)
def test_leaves(name: str):
    paths = [path for path in FILES if unit(module_name(path)) == name]
    assert paths
    for path in paths:
        assert own_imports(path) <= LEAVES[name], path.name


@pytest.mark.parametrize("path", [ROOT / "main.py", *FILES], ids=module_name)
def test_torch_is_never_imported(path: pathlib.Path):
    foreign = {name.split(".")[0] for name in imports(path)}
    assert not foreign & {"torch", "torchvision", "open_clip", "clip"}


def test_reading_data_needs_no_accelerator():
    """Only the part that puts batches onto the mesh knows JAX."""
    users = {
        path.name
        for path in FILES
        if "data" in path.parts and "jax" in {name.split(".")[0] for name in imports(path)}
    }
    assert users == {"feed.py"}


def test_tensorflow_comes_through_one_door():
    """Else it takes the memory of every GPU away from JAX."""
    users = {
        path.name
        for path in FILES
        if "tensorflow" in {name.split(".")[0] for name in imports(path)}
    }
    assert users == {"tensorflow_cpu.py"}


def test_modules_import():
    for path in FILES:
        importlib.import_module(module_name(path))


def test_configs_are_light():
    """--help and a mistyped setting answer at once: a config loads no JAX."""
    code = "import sys; from clip_jax.configs import default, vit_b32; vit_b32.get_config('smoke');"
    code += "sys.exit(bool({'jax', 'flax', 'tensorflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_trainer_imports_what_it_runs(tmp_path: pathlib.Path):
    """Solvers, readers of others' weights, tools and plotting wait for those who need them."""
    code = (
        "import pathlib, sys; from clip_jax.configs import vit_b32; from clip_jax.training import "
    )
    code += "run, train; run.prepare(vit_b32.get_config('smoke'), pathlib.Path(sys.argv[1]))"
    code += "; print(*sorted(sys.modules), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert {"clip_jax.evaluate.evaluator", "clip_jax.data.sources.digits"} <= loaded
    foreign = {"jinja2", "matplotlib", "pandas", "scipy.stats", "sklearn", "tensorflow"}
    assert not loaded & foreign
    tools = ("curation", "export", "plan", "search", "status", "sweep", "weights")
    tools += ("evaluate.measures.lbfgs",)
    options = ("common.goodput", "common.pages", "data.processes", "data.published")
    unused = tuple(f"clip_jax.{name}" for name in (*tools, *options))
    assert not {name for name in loaded if name.startswith(unused)}


def test_import_alone_is_light():
    """`import clip_jax` loads nothing; what is used is loaded then."""
    code = "import sys, clip_jax; sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- Configs -----------------------------------------------------------------------------------

CONFIGS = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "default")
)


def get_config(name: str, argument: str) -> ConfigDict:
    return importlib.import_module(f"clip_jax.configs.{name}").get_config(argument)


def fields(config: ConfigDict, prefix: str = "") -> set[str]:
    """Names of all settings; those of stages, which are some of them, aside."""
    found = set()
    for name in set(config) - {"stages"}:
        value = config.get(name)
        inner = fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else set()
        found |= inner or {prefix + name}
    return found


def test_there_is_a_config_for_every_model():
    """But for those that are named because weights of them are published."""
    from clip_jax import models

    published = {"SigLIP2-B/16", "MetaCLIP2-H/14", "CLIPA-L/14", "CLIPA-H/14"}
    published |= {"PE-Core-B/16", "PE-Core-L/14@336px"}
    names = {get_config(name, "").model.name for name in CONFIGS}
    assert names | published == set(models.available_models())


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_config(name: str):
    from clip_jax.training import program

    config = get_config(name, "smoke")
    validation.validate(config)
    assert fields(config) == fields(default.get_config())
    assert config.data.source.type == "digits"
    _, net = program.make_mesh_and_net(config)
    assert net.size.is_resnet == config.model.name.startswith("RN")


@pytest.mark.parametrize("name", CONFIGS)
def test_full_config(name: str):
    """Runs as it stands, or says that it names no data and what to do."""
    from clip_jax.training import program

    config = get_config(name, "")
    assert fields(config) == fields(default.get_config())
    program.make_mesh_and_net(config)
    if config.data.source.type:
        validation.validate(config)
        return
    with pytest.raises(UserError, match=r"names no training data: set --config.*:smoke"):
        validation.validate(config)
    config.data.source.type = "tar"
    if config.init_params:  # as LiT, which begins with a tower of some model
        with pytest.raises(UserError, match="init_from names no model"):
            validation.validate(config)
        config.init_from = "a model"
    validation.validate(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_config_argument(name: str):
    with pytest.raises(UserError, match=r"'smok'.*smoke"):
        get_config(name, "smok")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_says_how_to_run_it(name: str):
    docstring = importlib.import_module(f"clip_jax.configs.{name}").__doc__
    assert f"python main.py --config=configs/{name}.py" in docstring
