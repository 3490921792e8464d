"""Checks the training command's options: they override files, which override the recipe; errors have one line."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from equimoe.launch.help import COMMON, field_comments, help_text
from equimoe.launch.options import ONLY_WITH, Launch, fields_of, hints_of, parse, to_yaml, value_of
from equimoe.launch.recipes import RECIPES
from equimoe.launch.recipes.table import PUBLISHED
from equimoe.launch.text import option_text
from equimoe.moe.config import CapacityConfig, ExtraLossConfig, RotaryScaling, RouterConfig, ZeroComputationConfig
from equimoe.moe.parallel.stages import check_pipeline
from equimoe.moe.train.config import OptimConfig, TrainConfig
from tests.helpers.slow import slow_but
from tests.helpers.small import changed

#: a valid value for fields where the next larger number or the last choice is not valid
OTHER_VALUES = {
    "data.mixture": "web=1",
    **{"optim.beta1": "0.5", "optim.beta2": "0.5", "data.heldout_fraction": "0.25"},
    **{"model.dense_layers": "2", "attention.num_kv_heads": "3", "attention.rotary_base": "500.0"},
    **{"attention.scaling.factor": "8.0", "attention.scaling.fast_turns": "8.0"},
    **{"parallel.ep": "4", "parallel.dp_shard": "2", "parallel.edp": "2"},
    "moe.widths": "384,192,192,192,192,192,96,96",
    **{"log.trackers": "wandb,mlflow", "log.profile": "10:13"},
}

CHOOSING = ["--moe.router.normalize_weights=false", "--moe.balance.coefficient=0", "--data.micro_batch=32"]
#: options that must be set first
ALSO = {
    **{
        name: [f"--{needed}={option_text(values[-1])}"]
        for start, (needed, values) in ONLY_WITH.items()
        for name in fields_of()
        if name == start or name.startswith(f"{start}.")
    },
    "placement.calibrate": ["--parallel.experts=fssdp", "--placement.memory_mb=9"],
    "moe.router.kept_groups": ["--moe.router.groups=2"],
    **dict.fromkeys(("moe.router.projection", "moe.router.temperature"), ["--moe.router.gate=cosine"]),
    "moe.router.cap": ["--moe.router.select=expert_choice_by_position", *CHOOSING],
    "moe.router.sees_future": ["--moe.router.select=expert_choice", *CHOOSING],
    "moe.router.vocabulary": ["--moe.router.gate=hash", "--moe.balance.coefficient=0"],
    "moe.router.slots": ["--moe.router.gate=slots", "--moe.router.sees_future", "--moe.top_k=1", *CHOOSING[1:2]],
    "moe.router.tasks": ["--moe.router.gate=task"],
    "moe.router.task_width": ["--moe.router.gate=task", "--moe.router.tasks=9"],
    "moe.router.top_p": ["--moe.router.select=top_p"],
    "moe.shared_gate": ["--moe.shared_intermediate_size=8"],
    "moe.capacity.max_tokens": ["--moe.capacity.pad"],
    "moe.dispatch.chunks": ["--moe.dispatch.name=overlapped"],
    "moe.dispatch.node_size": ["--moe.dispatch.name=hierarchical"],
}


def another_value(name: str, hint: Any, current: Any) -> str:
    """Return the text of a value of this type that differs from ``current``."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if get_origin(hint) is not Literal else [hint]
    kind = kinds[0] if kinds else hint
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != current)
    if kind is bool:
        return "false" if current else "true"
    if kind is float:
        return str(0.75 if current is None or current != 0.75 else 0.5)
    if kind is int:
        return str(2 * (current or 4))
    assert kind is str, f"{name}: no value for {hint}"
    return "elsewhere"


def is_text(hint: Any) -> bool:
    return hint is str or str in get_args(hint)


#: sections that are off by default
OPTIONAL = ("moe.capacity", "moe.zero_computation", "attention.scaling")
FIELDS = [name for name in fields_of() if name not in OPTIONAL]


def test_the_walk_finds_every_leaf_of_the_configuration() -> None:
    def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for name, value in values.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
        return found

    scaled = replace(TrainConfig().attention, scaling=RotaryScaling())
    sections = {"capacity": CapacityConfig(), "zero_computation": ZeroComputationConfig(), "attention": scaled}
    assert set(FIELDS) == leaves(asdict(changed(TrainConfig(), **sections)))
    assert len(FIELDS) > 40


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("joined", [True, False])
def test_every_field_can_be_set(name: str, joined: bool) -> None:
    start = RECIPES["quickstart"]()
    optional = name.startswith(OPTIONAL)
    current = None if optional else value_of(start, name)
    text = another_value(name, fields_of()[name], current)
    option = "--" + name.replace("_", "-")
    also = ALSO.get(name, [])
    config = parse([*also, *([f"{option}={text}"] if joined else [option, text])]).config
    found = value_of(config, name)
    assert found != current
    assert str(found).lower() == text
    set_fields = {n for n in FIELDS if not n.startswith(OPTIONAL) and value_of(config, n) != value_of(start, n)}
    others = {option[2:].split("=")[0] for option in also}
    assert set_fields - others == (set() if optional else {name})


@pytest.mark.parametrize("name", ["recipe", "config", "run-dir"] + [n for n, h in fields_of().items() if is_text(h)])
@pytest.mark.parametrize("text", ["", " "])
def test_empty_text_is_refused(name: str, text: str, tmp_path: Path) -> None:
    """An unset shell variable gives an empty text."""
    with pytest.raises(ValueError, match=rf"^--{name}={text}: is empty; give a value, or leave the option out$"):
        parse([f"--{name}", text])
    if "." in name:
        file = tmp_path / "config.yaml"
        section, field = name.split(".")
        file.write_text(f"{section}: {{{field}: '{text}'}}")
        with pytest.raises(ValueError, match=f"{name}='{text}': is empty; "):
            parse(["--config", str(file)])


@pytest.mark.parametrize("recipe", slow_but(["quickstart", "gshard", "deepseek_v3", "pangu_pro_72b"], RECIPES))
def test_a_printed_configuration_comes_back_exactly(recipe: str, tmp_path: Path) -> None:
    argv = ["--recipe", recipe, "--optim.lr", "1.2345e-7", "--data.text_field", "1e-3"]
    if recipe not in ("expert_choice", "softmoe"):  # their experts have equal loads, and no capacity
        argv += ["--moe.capacity.factor", "1.1"]
    config = parse(argv).config
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    for other in RECIPES:
        assert parse(["--recipe", other, "--config", str(file)]).config == config
    assert config.data.text_field == "1e-3"


#: texts of a form of their own
FORMED = ("moe.widths", "data.mixture", "log.trackers", "log.profile")
FREE_TEXT = [name for name, hint in fields_of().items() if is_text(hint) and name not in FORMED]


@pytest.mark.parametrize("name", FREE_TEXT)
@pytest.mark.parametrize("text", ["null", "none", "true", "12", "1e3", "~", " x: y", "#"])
def test_awkward_text_comes_back_exactly(name: str, text: str, tmp_path: Path) -> None:
    section, field = name.split(".")
    start = TrainConfig()
    needs = {"deepspeed": {"engine": section}, "placement": {"parallel": replace(start.parallel, experts="fssdp")}}
    config = replace(start, **needs.get(section, {}), **{section: replace(getattr(start, section), **{field: text})})  # type: ignore[arg-type]
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse(["--config", str(file)]).config == config


def test_a_renamed_option_names_the_new_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--log.tensorboard: use --log.trackers: 'tensorboard' for true, 'none' for"):
        parse(["--log.tensorboard", "false"])
    file = tmp_path / "older.yaml"
    file.write_text("log: {every: 5, tensorboard: true}")
    with pytest.raises(ValueError, match=r"older.yaml: log.tensorboard: use log.trackers: 'tensorboard' for true"):
        parse(["--config", str(file)])


def test_trackers_are_named() -> None:
    known = "tensorboard, wandb, mlflow, separated by commas"
    for text in ("tensorbord", ",", "wandb;mlflow", "wandb,none"):
        with pytest.raises(ValueError, match=f"^log.trackers={text}: use some of {known}"):
            parse(["--log.trackers", text])
    assert parse(["--log.trackers", "none"]).config.log.trackers is None


def test_defaults() -> None:
    assert parse([]) == Launch(RECIPES["quickstart"](), "quickstart", Path("runs/quickstart"))
    assert parse(["--recipe", "mixtral"]).run_dir == Path("runs/mixtral")


def test_flags_of_the_run() -> None:
    launch = parse(["--run-dir", "a/b", "--resume", "--dry-run", "--print_config", "--steps", "7"])
    assert (launch.run_dir, launch.resume, launch.dry_run, launch.print_config) == (Path("a/b"), True, True, True)
    assert launch.config.steps == 7
    assert parse(["--run_dir=c", "--resume=false"]) == Launch(RECIPES["quickstart"](), "quickstart", Path("c"))


def test_later_wins_over_earlier_and_options_over_files(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("steps: 5\nseed: 6\noptim:\n  lr: 1e-3\n  warmup-steps: 9\n")
    second.write_text("steps: 8\n")
    argv = ["--seed", "1", "--config", str(first), "--config", str(second), "--seed", "2"]
    config = parse(argv).config
    assert (config.steps, config.seed) == (8, 2)
    assert (config.optim.lr, config.optim.warmup_steps) == (0.001, 9)
    assert config.optim.beta2 == RECIPES["quickstart"]().optim.beta2


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--moe.capacity.factor", "1.5"], CapacityConfig(factor=1.5)),
        (["--moe.capacity.drop", "position"], CapacityConfig(drop="position")),
        (["--moe.capacity.factor", "1.5", "--moe.capacity", "none"], None),
        (
            ["--moe.capacity", "none", "--moe.capacity.factor", "2", "--moe.capacity.drop=position"],
            CapacityConfig(2.0, "position"),
        ),
    ],
)
def test_the_optional_section(argv: list[str], expected: CapacityConfig | None) -> None:
    assert parse(argv).config.moe.capacity == expected


@pytest.mark.parametrize(
    ("before", "text", "expected"),
    [
        ("", "{}", CapacityConfig()),
        ("", "{factor: 2}", CapacityConfig(factor=2.0)),
        ("{factor: 3.0}", "{drop: position}", CapacityConfig(factor=3.0, drop="position")),
        ("{factor: 3.0}", "{}", CapacityConfig(factor=3.0)),
        ("{factor: 3.0}", "", CapacityConfig(factor=3.0)),
        ("{factor: 3.0}", "null", None),
        ("{factor: 3.0}", "none", None),
    ],
)
def test_the_optional_section_in_files(before: str, text: str, expected: CapacityConfig | None, tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    for file, given in ((first, before), (second, text)):
        file.write_text(f"moe: {{capacity: {given}}}" if given else "")
    assert parse(["--config", str(first), "--config", str(second)]).config.moe.capacity == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model.recompute"], True),
        (["--model.recompute", "--steps", "3"], True),
        (["--model.recompute", "true"], True),
        (["--model.recompute=False"], False),
        (["--model.recompute", "--model.recompute", "no"], False),
    ],
)
def test_booleans(argv: list[str], expected: bool) -> None:
    assert parse(argv).config.model.recompute is expected


def test_numbers_and_none() -> None:
    config = parse(["--optim.lr", "1e-3", "--optim.grad_clip", "2", "--data.builtin_bytes_per_domain", "none"]).config
    assert config.optim == replace(RECIPES["quickstart"]().optim, lr=0.001, grad_clip=2.0)
    assert isinstance(config.optim.grad_clip, float)
    assert config.data.builtin_bytes_per_domain is None
    assert parse(["--model.vocab_size", "512"]).config.model.vocab_size == 512


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--moe.num_expert", "3"], "--moe.num_expert: no such option; did you mean --moe.num_experts?"),
        (["--lr", "1"], "--lr: no such option; did you mean --optim.lr?"),
        (["--recip", "x"], "--recip: no such option; did you mean --recipe?"),
        (["--qqqqqq", "1"], "--qqqqqq: no such option"),
        (["--moe", "3"], "--moe: is a section; set one of its fields, such as --moe.hidden_size"),
        (["--model.top_k", "3"], "--model.top_k: no such option; did you mean --moe.top_k?"),
        (["--balance.scope", "micro"], "--balance.scope: no such option; did you mean --moe.balance.scope?"),
        (["--moe.capacity", "3"], "--moe.capacity=3: use none, or set a field, such as --moe.capacity.factor"),
        (["--steps", "1.5"], "--steps=1.5: must be a whole number"),
        (["--steps", "abc"], "--steps=abc: must be a whole number"),
        (["--steps", "true"], "--steps=true: must be a whole number"),
        (["--steps", "none"], "--steps=none: must be a whole number"),
        (["--steps="], "--steps=: must be a whole number"),
        (["--steps"], "--steps: give a value (a whole number), as in --steps VALUE or --steps=VALUE"),
        (["--optim.lr", "nan"], "--optim.lr=nan: must be a finite number"),
        (["--optim.lr", "true"], "--optim.lr=true: must be a finite number"),
        (["--model.recompute", "maybe"], "--model.recompute=maybe: must be true or false"),
        (["--model.vocab_size", "x"], "--model.vocab_size=x: must be a whole number or none"),
        (["--dtype", "fp16"], "--dtype=fp16: must be one of float32, bfloat16"),
        (["--recipe", "nope"], f"--recipe=nope: no such recipe; use one of {', '.join(RECIPES)}"),
        (["--resume", "runs/x"], "--resume=runs/x: must be true or false"),
        (["--run-dir="], "--run-dir=: is empty; give a value, or leave the option out"),
        (["--processes", "0"], "--processes=0: must be at least 1"),
        (["--moe.shared_gate"], "moe.shared_gate=True: needs shared experts; set shared_intermediate_size"),
        (["steps"], "steps: is not an option; write options as --name value"),
        (
            ["--config", "no/such.yaml"],
            "--config=no/such.yaml: cannot be read (No such file or directory); give a YAML file",
        ),
        (["--allow-change", "zzzzzz"], "--allow-change=zzzzzz: no such setting; --help all lists them"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--optim.lr", "-1e-3"], "optim.lr=-0.001: must be positive"),
        (["--moe.top-k", "99"], "moe.top_k=99: must be at most num_experts=8"),
        (["--moe.capacity.factor=-1"], "moe.capacity.factor=-1.0: must be positive; 1.25 is usual"),
        (["--parallel.ep", "3"], "parallel.ep=3: must divide moe.num_experts=8"),
        (
            ["--recipe", "hmoe_3b", "--parallel.ep", "8"],
            "parallel.ep=8: must divide moe.num_experts=8, and moe.widths=2304,5888,2816,5376,3328,4864,3840,4352 into "
            "runs with equal sums (possible: 1, 2, 4)",
        ),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(argv)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "modle: no such key; did you mean model?"),
        ("moe: {num_expert: 3}", "moe.num_expert: no such key; did you mean moe.num_experts?"),
        ("moe.num_experts: 3", "moe.num_experts: nest the key under its section"),
        ("model: 3", "model=3: must be a mapping of num_layers, num_heads"),
        ("model:", "model=None: must be a mapping of num_layers, num_heads"),
        (
            "moe: {capacity: 3}",
            "moe.capacity=3: must be a mapping of factor, drop, scope, level, pad, max_tokens or none",
        ),
        ("steps: 1.5", "steps=1.5: must be a whole number"),
        ("steps: true", "steps=True: must be a whole number"),
        ("steps: '5'", "steps='5': must be a whole number"),
        ("optim: {lr: fast}", "optim.lr='fast': must be a finite number"),
        ("optim: {lr: .nan}", "optim.lr=nan: must be a finite number"),
        ("model: {recompute: 1}", "model.recompute=1: must be true or false"),
        ("data: {path: 5}", "data.path=5: must be text or none"),
        ("[1, 2]", "must be a mapping of steps, seed"),
        ("a: b: c", "line 1, column 5: not YAML: mapping values are not allowed here"),
        ("a: [1", "not YAML: "),
    ],
)
def test_mistakes_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        parse(["--config", str(file)])
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"is not UTF-8 text; give a YAML file$"):
        parse(["--config", str(file)])
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); give a YAML file$"):
        parse(["--config", str(tmp_path)])


@pytest.mark.parametrize("asked", [["--help", "all"], ["--help=all"], ["--recipe", "mixtral", "-h", "all"]])
def test_help_lists_every_option_with_its_comment(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(asked)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for name in fields_of():
        assert f"--{name} " in text
    for recipe in RECIPES:
        assert f"  {recipe}: " in text
    assert "--dtype float32|bfloat16" in flat
    assert "use an MoE layer in every n-th block, starting with the n-th; 1: in all blocks, 0: in none" in flat
    assert "--model.vocab_size INT|none" in flat
    assert ("router.softmax_after_topk true|false" in flat) and (":func:" not in text) and ("``" not in text)
    shown = RECIPES["mixtral" if "mixtral" in asked else "quickstart"]()
    assert f"--moe.hidden_size INT width of the hidden states; default {shown.moe.hidden_size} " in flat
    assert max(map(len, text.splitlines())) <= 120


def test_help_is_read_from_the_source() -> None:
    comments = field_comments(OptimConfig)
    assert comments["min_lr_ratio"] == "final learning rate as a fraction of lr"
    assert comments["beta1"] == "decay of AdamW's mean of gradients, per step"
    assert "chosen logits (Mixtral) instead of taking" in field_comments(RouterConfig)["softmax_after_topk"]
    assert field_comments(type("Made", (), {})) == {}
    assert "default 2000000" in " ".join(help_text(RECIPES["quickstart"](), "all").split())


def test_short_help_fits_on_two_screens(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--recipe", "mixtral", "--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 90 and max(map(len, text.splitlines())) <= 120
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  --")][-len(COMMON) :] == [
        f"--{name}" for name in COMMON
    ]
    assert "--moe.num_experts INT                     number of routed experts; default 8" in text
    assert "  optim           The optimizer and the learning-rate schedule." in text


@pytest.mark.parametrize(
    ("topic", "first", "options"),
    [
        ("optim", "optim: The optimizer and", len(hints_of(OptimConfig))),
        ("moe.balance.extra", "moe.balance.extra: ", len(hints_of(ExtraLossConfig))),
        ("megatron", 'megatron: Megatron-Core, if engine is "megatron".', 1),
        ("optim.decay-fraction", "  --optim.decay_fraction NUMBER", 1),
    ],
)
def test_help_of_a_section(topic: str, first: str, options: int) -> None:
    lines = help_text(RECIPES["quickstart"](), topic).splitlines()
    assert lines[0].startswith(first) and sum(line.startswith("  --") for line in lines) == options


def test_help_of_what_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^--help=balanc: no such section; did you mean moe.balance\?; --help lists"):
        parse(["--help", "balanc"])


@pytest.mark.parametrize("name", fields_of())
def test_every_option_has_a_description(name: str) -> None:
    if name in OPTIONAL:
        return
    (row,) = help_text(RECIPES["quickstart"](), name).split("\n\n")
    description = " ".join(row.split()[2:])
    assert len(description.partition("; default")[0]) > 10, row


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--attention.kv_lora_rank 8", "has no effect with attention.kind=grouped; add --attention.kind latent, or"),
        ("--recompute.part attention", "has no effect with model.recompute=false; add --model.recompute true, or"),
        ("--optim.decay_fraction 0.5", "has no effect with optim.schedule=cosine; add --optim.schedule wsd or"),
        ("--health.spike-sigmas 3", "spike=ignore; add --health.spike stop or --health.spike skip or --health.spike r"),
        ("--data.path x --data.builtin_bytes_per_domain 9", "no effect with data.path=x; add --data.path none, or"),
    ],
)
def test_an_option_without_effect_is_refused(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(given.split())


def test_options_that_need_others_exist() -> None:
    config = RECIPES["quickstart"]()
    for name, (field, _) in ONLY_WITH.items():
        assert value_of(config, name) is not None or name in fields_of()
        assert field in fields_of()
    assert parse(["--optim.schedule", "wsd", "--optim.decay_fraction", "0.5"]).config.optim.decay_fraction == 0.5
    assert parse(["--recompute.layers", "none"]).config == config, "an option that changes nothing is fine"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world", [8, 64, 1024, 16384])
def test_a_recipe_runs_on_any_number_of_ranks_or_says_what_to_change(recipe: str, world: int) -> None:
    """A batch that divides may have too few micro-batches for the pipeline, which the next message says."""
    options: dict[str, str] = {}

    def wrong() -> str:
        config = parse(["--recipe", recipe, *(f"--{name}={value}" for name, value in options.items())]).config
        try:
            degrees = config.degrees(world)
            number = config.micro_batches(degrees.dp)
            if degrees.pp > 1:
                of_rank, layers = degrees.stages_of_rank, config.model.num_layers
                check_pipeline(degrees.schedule, degrees.pp, of_rank, number, layers, config.data.micro_batch)
        except ValueError as error:
            return str(error)
        return ""

    for _ in range(2):
        message, whole = wrong(), int(options.get("data.global_batch", RECIPES[recipe]().data.global_batch))
        if batch := re.search(r"set (?:data.micro_batch=(\d+), or )?data.global_batch=(\d+)$", message):
            if batch[1] is not None:
                options["data.micro_batch"] = batch[1]
                assert not wrong() or "parallel.schedule" in wrong()
                del options["data.micro_batch"]
            options["data.global_batch"] = batch[2]
        elif factor := re.search(r"multiply data.global_batch by (\d+)(?:/(\d+))?, ", message):
            options["data.global_batch"] = str(whole * int(factor[1]) // int(factor[2] or 1))
        elif message:
            needed = re.search(r"make the number of processes a multiple of (\d+)", message)
            assert needed is not None and world % int(needed[1]), message
            return
    assert not wrong()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str) -> None:
    config, ranks = RECIPES[recipe](), 2 if recipe == "quickstart" else 8
    if (published := PUBLISHED.get(recipe)) is not None:
        ranks = published.ranks
        if (config.parallel.pp, config.parallel.ep) != (1, 1):
            with pytest.raises(ValueError, match="which is 1; make the number of processes a multiple of [0-9]+,"):
                config.degrees(1)
    else:
        assert config.micro_batches(config.degrees(1).dp) >= 1
    degrees = config.degrees(ranks)
    assert published is not None or degrees.ep == ranks
    assert config.micro_batches(degrees.dp) >= max(degrees.pp, 1)
    scopes = {"quickstart": "global", "qwen3_global_batch": "global", "mixtral": "micro", "deepseek_v3": "sequence"}
    assert config.moe.balance.scope == scopes.get(recipe, config.moe.balance.scope)
    assert yaml.safe_load(to_yaml(config))["moe"]["num_experts"] == config.moe.num_experts
    assert (RECIPES[recipe].__doc__ or "").strip()
