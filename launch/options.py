"""The command line of ``python -m equimoe.launch.train``: options override YAML files, which override a recipe."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..moe.train.config import TrainConfig
from .initial import Initial
from .recipes import RECIPES
from .recipes.scale import SCALES, Scale
from .strict_yaml import read_yaml
from .text import option_text

#: limits of every number of the configuration
LARGEST_INT, LARGEST_FLOAT = 1 << 48, 3.4e38


@dataclass(frozen=True)
class Launch:
    """A parsed command line."""

    config: TrainConfig
    #: name of the recipe that the configuration is based on
    recipe: str
    #: folder for metrics, checkpoints and the report
    run_dir: Path
    #: ranks to start on this machine; None: one, or those that torchrun has started
    processes: int | None = None
    #: folder with the weights to start from: a transformers model, a checkpoint or a run
    init: Path | None = None
    #: resume from the newest checkpoint in ``run_dir``
    resume: bool = False
    #: fields and sections of the configuration that may differ from the resumed run's
    allow_change: tuple[str, ...] = ()
    #: resume if ``run_dir`` holds a checkpoint, and start a new run otherwise
    requeue: bool = False
    #: check everything, but do not train
    dry_run: bool = False
    #: print the configuration (:func:`to_yaml`), but do not train
    print_config: bool = False


#: fields of older versions -> what to write instead
RENAMED = {"log.tensorboard": "log.trackers: 'tensorboard' for true, 'none' for false"}

#: options that are not part of the configuration: (type, help text)
RUN_OPTIONS: dict[str, tuple[Any, str]] = {
    "recipe": (str, "configuration to start from; default quickstart"),
    "scale": (Scale, "tiny: train the recipe's routing and balance in a small model, on two CPU cores; default full"),
    "config": (str, "YAML file that overrides the recipe; may be given more than once"),
    "run_dir": (str, "folder for metrics, checkpoints and report; default runs/RECIPE"),
    "init.from": (str, "start from these weights: a folder of transformers, a checkpoint or a run; sets the model"),
    "processes": (int, "ranks to start on this machine; default 1"),
    "resume": (bool, "resume from the newest checkpoint in the run folder"),
    "allow_change": (str, "setting that a resumed run may change although it changes what is trained; repeatable"),
    "requeue": (bool, "for schedulers: resume if the run folder has a checkpoint, else start"),
    "dry_run": (bool, "check configuration and data and build the model, but do not train"),
    "print_config": (bool, "print the complete configuration as YAML for --config, but do not train"),
    "help": (str, "print this text, all options, those of a section such as moe.balance, or the sizes of recipes"),
}
#: option or section -> the field that must have one of these values for it to have any effect
ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("attention.num_kv_heads", "attention.head_width"), ("attention.kind", ("grouped",))),
    **dict.fromkeys(("attention.qk_norm", "attention.qk_norm_over"), ("attention.kind", ("grouped",))),
    **dict.fromkeys(("attention.q_lora_rank", "attention.kv_lora_rank"), ("attention.kind", ("latent",))),
    **dict.fromkeys(("attention.qk_nope_width", "attention.qk_rope_width"), ("attention.kind", ("latent",))),
    "attention.v_width": ("attention.kind", ("latent",)),
    "recompute": ("model.recompute", (True,)),
    "data.builtin_bytes_per_domain": ("data.path", (None,)),
    "optim.decay_fraction": ("optim.schedule", ("wsd", "power")),
    "optim.min_lr_ratio": ("optim.schedule", ("cosine", "wsd", "power")),
    **dict.fromkeys(("optim.power_amplitude", "optim.power_exponent"), ("optim.schedule", ("power",))),
    "optim.momentum": ("optim.name", ("muon",)),
    "placement": ("parallel.experts", ("fssdp",)),
    "deepspeed": ("engine", ("deepspeed",)),
    "megatron": ("engine", ("megatron",)),
    "health.spike_sigmas": ("health.spike", ("stop", "skip", "revisit")),
}


def parse(argv: list[str]) -> Launch:
    """Parse a command line, given without the program's name.

    Later options override earlier ones, options override files, and files override the recipe. ``--help`` prints a help
    text and raises SystemExit(0). Raises a one-line ValueError for an unknown option or key (suggesting the nearest
    one), a value of the wrong type, a file that cannot be read, an option without effect, or an inconsistent
    configuration.
    """
    given = list(_given(argv))
    run: dict[str, Any] = {name: False if hint is bool else None for name, (hint, _) in RUN_OPTIONS.items()}
    files = [text for name, text in given if name == "config"]
    for name, text in given:
        if name == "help":
            run[name] = text or ""
        elif name in RUN_OPTIONS:
            run[name] = _from_text(RUN_OPTIONS[name][0], name.replace("_", "-"), text)
    recipe = "quickstart" if run["recipe"] is None else run["recipe"]
    if recipe not in RECIPES:
        raise ValueError(f"--recipe={recipe}: no such recipe; use one of {', '.join(RECIPES)}")
    scale = run["scale"] or "full"
    start = SCALES[cast(Scale, scale)](RECIPES[recipe]())
    if run["help"] is not None:
        from .help import help_text  # which reads this module

        print(help_text(start, run["help"]))
        raise SystemExit(0)
    if run["processes"] is not None and run["processes"] < 1:
        raise ValueError(f"--processes={run['processes']}: must be at least 1")
    values = asdict(start)
    run_dir = Path(run["run_dir"] or f"runs/{recipe}{'' if scale == 'full' else f'-{scale}'}").expanduser()
    begun = run_dir if run["resume"] or run["requeue"] else None
    initial = None if run["init.from"] is None else Initial(Path(run["init.from"]).expanduser(), begun)
    if initial is not None:
        initial.apply(values)
    for file in files:
        _merge(values, _read_yaml(str(file)), TrainConfig, "", str(file))
    for name, text in given:
        if name not in RUN_OPTIONS:
            _override(values, name, text)
    if initial is not None:
        initial.check(values)
    config = _build(TrainConfig, values)
    for name, _ in given:
        if name not in RUN_OPTIONS:
            _check_effect(name, config, start)
    return Launch(
        config=config,
        recipe=recipe,
        run_dir=run_dir,
        processes=run["processes"],
        init=None if initial is None else initial.path,
        resume=run["resume"],
        allow_change=tuple(_known(text) for name, text in given if name == "allow_change"),
        requeue=run["requeue"],
        dry_run=run["dry_run"],
        print_config=run["print_config"],
    )


def to_yaml(config: TrainConfig) -> str:
    """Return the complete configuration as YAML. Passed to ``--config``, it gives an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


# ---- fields of the configuration


@cache
def hints_of(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def section_of(hint: Any) -> Any:
    """Return the dataclass of a ``Section`` or ``Section | None`` hint, or None if it is not a section."""
    return next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)


def fields_of(cls: type = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Return the type of every field by dotted name. An optional section also has an entry itself."""
    found: dict[str, Any] = {}
    for name, hint in hints_of(cls).items():
        section = section_of(hint)
        if section is None or type(None) in get_args(hint):
            found[prefix + name] = hint
        if section is not None:
            found |= fields_of(section, f"{prefix}{name}.")
    return found


def _known(text: str | None) -> str:
    """Return the dotted name of a field or section as it is in the configuration."""
    names = fields_of()
    sections = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    name = str(text).replace("-", "_")
    if name not in names and name not in sections:
        near = suggest(name, [*names, *sorted(sections)])
        raise ValueError(f"--allow-change={text}: no such setting{near or '; --help all lists them'}")
    return name


def suggest(name: str, names: list[str], mark: str = "") -> str:
    """Return ``; did you mean ...?`` with the nearest name, preferring the same field of another section."""
    same = [other for other in names if other.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    near = same[:1] or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {mark}{near[0]}?" if near else ""


def _wanted(hint: Any) -> str:
    """Describe in words which values a type allows."""
    parts = [part for part in get_args(hint) if part is not type(None)] if get_origin(hint) is not Literal else [hint]
    kind = parts[0] if parts else hint
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    text = f"one of {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else words.get(kind, "")
    if section := section_of(hint):
        text = f"a mapping of {', '.join(hints_of(section))}"
    return text + (" or none" if type(None) in get_args(hint) else "")


# ---- from the command line


def _given(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each option's name (with underscores) and value; the value is None if none was given."""
    names = [*RUN_OPTIONS, *fields_of()]
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "-h":
            token = "--help"
        if not token.startswith("--") or token == "--":
            raise ValueError(f"{token}: is not an option; write options as --name value")
        typed, equals, text = token[2:].partition("=")
        name = typed.replace("-", "_")
        if name in RENAMED:
            raise ValueError(f"--{typed}: use --{RENAMED[name]}")
        if name not in names:
            inside = [other for other in names if other.startswith(name + ".")]
            if inside:
                raise ValueError(f"--{typed}: is a section; set one of its fields, such as --{inside[0]}")
            raise ValueError(f"--{typed}: no such option{suggest(name, names, '--')}")
        if equals:
            yield name, text
        else:
            yield name, rest.pop(0) if rest and not rest[0].startswith("--") else None


def _from_text(hint: Any, name: str, text: str | None) -> Any:
    """Convert ``text`` to a value of type ``hint``. A bool option without a value is true."""
    if text is None:
        if hint is not bool:
            raise ValueError(f"--{name}: give a value ({_wanted(hint)}), as in --{name} VALUE or --{name}=VALUE")
        return True
    if type(None) in get_args(hint) and text.strip().lower() in ("none", "null"):
        return None
    if str in (hint, *get_args(hint)) and not text.strip():
        raise ValueError(f"--{name}={text}: is empty; give a value, or leave the option out")
    if section := section_of(hint):
        raise ValueError(f"--{name}={text}: use none, or set a field, such as --{name}.{next(iter(hints_of(section)))}")
    try:
        return _adapter(hint).validate_strings(text)
    except ValidationError:
        raise ValueError(f"--{name}={text}: must be {_wanted(hint)}") from None


def _override(values: dict[str, Any], name: str, text: str | None) -> None:
    """Set the field with this dotted name. An optional section that was off is switched on with its defaults."""
    value = _from_text(fields_of()[name], name, text)
    *path, last = name.split(".")
    for part in path:
        if values[part] is None:
            values[part] = {}
        values = values[part]
    values[last] = value


def value_of(config: TrainConfig, name: str) -> Any:
    """Return the value of a field by its dotted name; None if its section is off."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _check_effect(name: str, config: TrainConfig, recipe: TrainConfig) -> None:
    """Raise ValueError for an option that changes the recipe, but nothing of what the run does."""
    needed, value = ONLY_WITH.get(name) or ONLY_WITH.get(name.partition(".")[0]), value_of(config, name)
    if needed is None or value == value_of(recipe, name):
        return
    field, values = needed
    found = value_of(config, field)
    if found not in values:
        remedy = " or ".join(f"--{field} {option_text(wanted)}" for wanted in values)
        problem = f"--{name}={option_text(value)}: has no effect with {field}={option_text(found)}"
        raise ValueError(f"{problem}; add {remedy}, or leave it out")


# ---- from YAML


def _read_yaml(file: str) -> dict[Any, Any]:
    try:
        found = read_yaml(Path(file).expanduser())
    except OSError as error:
        raise ValueError(f"--config={file}: cannot be read ({error.strerror or error}); give a YAML file") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{file}: must be a mapping of {', '.join(hints_of(TrainConfig))}")
    return found or {}


def _merge(values: dict[str, Any], given: dict[Any, Any], cls: type, prefix: str, file: str) -> None:
    """Override ``values`` with a nested mapping of class ``cls``, checking each key and the type of each value."""
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if prefix + name in RENAMED:
            raise ValueError(f"{file}: {prefix}{key}: use {RENAMED[prefix + name]}")
        if name not in hints_of(cls):
            near = suggest(prefix + name, [*fields_of(), *hints_of(TrainConfig)])
            remedy = "no such key" + near if name not in fields_of() else "nest the key under its section"
            raise ValueError(f"{file}: {prefix}{key if isinstance(key, str) else reprlib.repr(key)}: {remedy}")
        hint = hints_of(cls)[name]
        section = section_of(hint)
        if section is not None and isinstance(value, dict):
            inside = values.get(name) or {}
            _merge(inside, value, section, f"{prefix}{name}.", file)
            values[name] = inside
        else:
            values[name] = _from_yaml(hint, prefix + name, value, file)


def _from_yaml(hint: Any, name: str, value: Any, file: str) -> Any:
    kinds = (hint, *get_args(hint))
    if type(None) in kinds and str not in kinds and isinstance(value, str) and value.lower() == "none":
        value = None
    try:
        if value is None and type(None) in kinds:
            return None
        if isinstance(value, str) and float in kinds:  # YAML 1.1 parses 1e-3 as a string
            return _adapter(hint).validate_strings(value)
        if section_of(hint) is None:
            return _adapter(hint).validate_python(value)
    except ValidationError:
        pass
    raise ValueError(f"{file}: {name}={reprlib.repr(value)}: must be {_wanted(hint)}")


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _build(cls: type, values: dict[str, Any], path: str = "") -> Any:
    """Build a dataclass from a nested mapping. The dataclasses validate themselves."""
    made = dict(values)
    for name, hint in hints_of(cls).items():
        if section_of(hint) is not None and made.get(name) is not None:
            made[name] = _build(section_of(hint), made[name], f"{path}{name}.")
        _check_size(path + name, made.get(name))
    try:
        return cls(**made)
    except ValueError as error:
        # a layer's configuration knows nothing of the section that it is in
        raise ValueError(f"moe.{error}" if path.startswith("moe.") else str(error)) from None


def _check_size(name: str, value: Any) -> None:
    """Raise ValueError for a number that no tensor's size and no fp32 value can have."""
    if isinstance(value, int) and abs(value) >= LARGEST_INT and name != "seed":
        raise ValueError(f"{name}={value}: must be less than 2**48, the most that a run can use; lower it")
    if isinstance(value, float) and abs(value) > LARGEST_FLOAT:
        raise ValueError(f"{name}={value}: must be at most {LARGEST_FLOAT}, the largest fp32 value; lower it")
