"""Configs that are taken, and the message of each one that is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from train.amounts import Amount, AmountUnit
from train.config import allowed_changes, differences, flatten, known_keys, parse_config
from train.errors import ConfigError
from train.recovery.policy import Rule
from train.settings import EngineKind, RecoverySettings, RunConfig, Veto

Node = dict[str, Any]
ComposeNode = Callable[..., Node]
ComposeConfig = Callable[..., tuple[RunConfig, Node]]

CONF = Path(__file__).resolve().parents[3] / "conf"
OPTIONS = sorted(
    "=".join(path.relative_to(CONF).with_suffix("").as_posix().rsplit("/", 1))
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF
)


def refusal(node: Node, *, world_size: int = 1) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(node, world_size=world_size)
    return caught.value.problems


@pytest.fixture
def problems_of(compose_node: ComposeNode) -> Callable[..., tuple[str, ...]]:
    """Return a function from command-line arguments to the problems that they cause."""

    def find(*arguments: str, world_size: int = 1) -> tuple[str, ...]:
        return refusal(compose_node(list(arguments)), world_size=world_size)

    return find


Problems = Callable[..., tuple[str, ...]]


# Configs that are taken.


def test_default_config_is_taken(compose_config: ComposeConfig) -> None:
    config, node = compose_config()
    assert config.run.name == node["run"]["name"] == "a-run"
    assert config.recovery.rule is Rule.LADDER
    assert config.recovery.skip == Amount(300, AmountUnit.BATCHES)


def test_recipe_of_falcon_recovers_as_falcon_did(compose_config: ComposeConfig) -> None:
    config, _ = compose_config(["+exp=falcon_like"])
    assert config.recovery.rule is Rule.FALCON
    assert config.recovery.skip == Amount(10**9, AmountUnit.TOKENS)
    assert config.recovery.rewind_steps == 0


@pytest.mark.parametrize("experiment", [[], ["+exp=falcon_like"]], ids=["plain", "falcon_like"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_is_taken(
    option: str, experiment: list[str], compose_config: ComposeConfig, tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    extra = {
        "tokenizer=file": [f"tokenizer.path={tokenizer}"],
    }
    if option.startswith("exp="):
        experiment = []
    config, node = compose_config([*experiment, option, *extra.get(option, [])])
    group, _, choice = option.partition("=")
    if "kind" in node.get(group, {}):
        assert node[group]["kind"] == choice
    assert config.run.steps > 0


def test_rule_and_engine_of_an_option_arrive(compose_config: ComposeConfig) -> None:
    config, _ = compose_config(["recovery=palm", "engine=fsdp"])
    assert config.recovery.rule is Rule.PALM
    assert config.engine.kind is EngineKind.FSDP


RULES = sorted(path.stem for path in (CONF / "recovery").glob("*.yaml"))


def test_every_rule_has_a_yaml_of_its_name() -> None:
    assert sorted(Rule) == RULES


@pytest.mark.parametrize("rule", RULES)
def test_yaml_of_a_rule_sets_that_rule_and_what_it_leaves_alone_is_the_ladder_s(
    rule: str, compose_config: ComposeConfig
) -> None:
    config, _ = compose_config([f"recovery={rule}"])
    ladder, _ = compose_config([])
    own = {"rule", "skip", "rewind_steps", "veto"}
    assert config.recovery.rule is Rule(rule)
    for field in fields(RecoverySettings):
        if field.name not in own:
            assert getattr(config.recovery, field.name) == getattr(ladder.recovery, field.name)


@pytest.mark.parametrize(
    ("rule", "skip", "rewind_steps"),
    [
        ("falcon", Amount(10**9, AmountUnit.TOKENS), 0),
        ("palm", Amount(300, AmountUnit.BATCHES), 100),
        ("ladder", Amount(300, AmountUnit.BATCHES), 100),
    ],
)
def test_amounts_are_those_that_were_published(
    rule: str, skip: Amount, rewind_steps: int, compose_config: ComposeConfig
) -> None:
    config, _ = compose_config([f"recovery={rule}"])
    assert (config.recovery.skip, config.recovery.rewind_steps) == (skip, rewind_steps)


def test_skip_and_rewind_are_scaled_to_the_size(compose_config: ComposeConfig) -> None:
    scales = ["recovery.token_scale=1e-4", "recovery.step_scale=0.1"]
    falcon, _ = compose_config(["recovery=falcon", *scales])
    palm, _ = compose_config(["recovery=palm", *scales])
    skips = [config.recovery.scaled(config.recovery.skip) for config in (falcon, palm)]
    assert skips == [Amount(100_000, AmountUnit.TOKENS), Amount(30, AmountUnit.BATCHES)]
    assert falcon.recovery.furthest_rewind_steps() == 0
    assert palm.recovery.furthest_rewind_steps() == 10


@pytest.mark.parametrize(
    ("rule", "veto"),
    [
        ("ladder", Veto.OUTLIER),
        ("skip_step", Veto.OUTLIER),
        ("falcon", Veto.NONFINITE),
        ("palm", Veto.NONFINITE),
        ("none", Veto.NONFINITE),
        ("observe", Veto.OFF),
    ],
)
def test_what_is_refused_goes_with_the_rule(
    rule: str, veto: Veto, compose_config: ComposeConfig
) -> None:
    config, _ = compose_config([f"recovery={rule}"])
    assert config.recovery.resolved_veto is veto


def test_config_is_frozen(compose_config: ComposeConfig) -> None:
    config, _ = compose_config()
    with pytest.raises(AttributeError):
        config.run.steps = 3  # type: ignore[misc]


def test_known_keys_are_those_of_the_composed_config(compose_node: ComposeNode) -> None:
    assert set(known_keys()) == flatten(compose_node()).keys()


# Configs that are refused: keys and types.


def test_unknown_key_is_refused_with_a_suggestion(problems_of: Problems) -> None:
    assert problems_of("model.hiden_size=3") == (
        "model.hiden_size=3: unknown key; did you mean model.hidden_size?",
    )


def test_known_key_in_the_wrong_group_is_found(problems_of: Problems) -> None:
    assert problems_of("run.num_layers=3") == (
        "run.num_layers=3: unknown key; did you mean model.num_layers?",
    )


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("+data.sources.a={paths: x, wieght: 1}", "did you mean data.sources.a.weight?"),
        ("+data.sources.a={paths: x, zzz: 1}", "remove it (`--cfg job` lists all keys)"),
        ("data.stages=[{start: 1B tokens, weigths: {a: 1}, weights: {a: 1}}]", "weights?"),
    ],
)
def test_misspelt_key_of_a_source_or_stage_is_found_beside_it(
    problems_of: Problems, override: str, hint: str
) -> None:
    (problem,) = problems_of(override)
    assert problem.endswith(hint)
    assert "unknown key" in problem


def test_unknown_group_is_refused(problems_of: Problems) -> None:
    assert problems_of("+typo=3") == (
        "typo=3: unknown key; remove it (`--cfg job` lists all keys)",
    )


def test_misspelt_group_is_refused_with_a_suggestion(problems_of: Problems) -> None:
    assert problems_of("+recovry=3") == ("recovry=3: unknown key; did you mean recovery?",)


def test_missing_key_is_refused(compose_node: ComposeNode) -> None:
    node = compose_node()
    del node["run"]["seed"]
    assert refusal(node) == ("run.seed: missing; set it, e.g. run.seed=...",)


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("run.steps=abc", "run.steps='abc': should be a valid integer"),
        ("run.steps=0", "run.steps=0: should be greater than 0"),
        ("run.steps=1.5", "run.steps=1.5: should be a valid integer"),
        ("run.seed=null", "run.seed=None: should be a valid integer"),
        ("run.name=../up", "run.name='../up': "),
        ("run.overwrite=maybe", "run.overwrite='maybe': should be a valid boolean"),
        ("optim.lr=-1", "optim.lr=-1: should be greater than 0"),
        ("optim.lr=nan", "optim.lr=nan: should be "),
        ("optim.lr=inf", "optim.lr=inf: should be "),
        ("optim.betas=[0.9,1.0]", "optim.betas.1=1.0: should be less than 1"),
        ("optim.betas=[0.9]", "optim.betas.1: missing"),
        ("tokenizer.vocab_size=256", "tokenizer.vocab_size=256: should be greater than"),
        ("model.activation=relu", "model.activation='relu': should be 'gelu' or 'swiglu'"),
        ("engine.zero_stage=4", "engine.zero_stage=4: should be less than or equal to 3"),
        ("checkpoint.keep_good=1", "checkpoint.keep_good=1: should be greater than or equal to 2"),
        ("recovery.skip=lots", "recovery.skip='lots': should be an amount such as \"1B tokens\""),
        ("recovery.rule=luck", "recovery.rule='luck': should be 'ladder', 'falcon', 'palm',"),
        ("recovery.ladder=[jump]", "recovery.ladder.0='jump': should be 'veto', 'replay', "),
        ("recovery.ladder=replay", "recovery.ladder='replay': should be a valid tuple"),
        ("recovery.growth=0.9", "recovery.growth=0.9: should be greater than or equal to 1"),
        ("recovery.growth=inf", "recovery.growth=inf: should be less than or equal to 100"),
        ("recovery.cool_factor=1", "recovery.cool_factor=1: should be less than 1"),
        ("recovery.cool_factor=0", "recovery.cool_factor=0: should be greater than 0"),
        ("recovery.cool_steps=0", "recovery.cool_steps=0: should be greater than 0"),
        ("recovery.max_vetoes_in_a_row=0", "recovery.max_vetoes_in_a_row=0: should be greater"),
        ("recovery.max_vetoes=-1", "recovery.max_vetoes=-1: should be greater than or equal to 0"),
        ("recovery.announced=[-1]", "recovery.announced.0=-1: should be greater than or equal"),
        ("checkpoint.keep_snapshots=1", "checkpoint.keep_snapshots=1: should be 0, or at least 2"),
        ("checkpoint.keep_snapshots=-1", "checkpoint.keep_snapshots=-1: should be 0, or at least"),
        ("checkpoint.retry_seconds=[-1]", "checkpoint.retry_seconds.0=-1"),
        ("checkpoint.max_failures=0", "checkpoint.max_failures=0: should be greater than"),
        ("checkpoint.keep_incidents=-1", "checkpoint.keep_incidents=-1: should be greater than"),
        (
            "checkpoint.snapshot_interval_steps=0",
            "checkpoint.snapshot_interval_steps=0: should be greater than 0",
        ),
        ("cluster.kind=cloud", "cluster.kind='cloud': should be 'local' or 'slurm'"),
    ],
)
def test_wrong_type_or_value_is_refused(argument: str, problem: str, problems_of: Problems) -> None:
    problems = problems_of(argument)
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_mode_of_another_tracker_is_refused(problems_of: Problems) -> None:
    (problem,) = problems_of("tracker=wandb", "tracker.mode=cloud")
    assert "tracker.mode='cloud' is not a mode of tracker.kind=wandb" in problem
    assert "use offline or online or disabled" in problem


def test_several_problems_come_in_one_message(compose_node: ComposeNode) -> None:
    node = compose_node(["run.steps=abc", "optim.lr=-1", "model.hiden_size=3", "+typo=3"])
    with pytest.raises(ConfigError) as caught:
        parse_config(node, world_size=1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems in the configuration:"
    assert len(lines) == 5
    assert all(line.startswith("  - ") for line in lines[1:])


def test_several_impossible_combinations_come_in_one_message(problems_of: Problems) -> None:
    problems = problems_of("model.num_heads=3", "schedule.warmup_steps=9999", "data.paths=/no")
    assert len(problems) == 3


def test_bad_config_has_the_exit_code_that_stops_a_requeue(problems_of: Problems) -> None:
    assert ConfigError(problems_of("+typo=3")).exit_code == 2


# Configs that are refused: combinations.


@pytest.mark.parametrize(
    ("arguments", "world_size", "problem"),
    [
        (
            ["schedule.batch_samples=18", "schedule.batch_ramp_steps=0"],
            4,
            "schedule.batch_samples=18 does not divide among 4 ranks; use 16 or 20",
        ),
        (
            ["schedule.batch_ramp_start_samples=2"],
            4,
            "schedule.batch_ramp_start_samples=2 does not divide among 4 ranks; use 4",
        ),
        (
            ["schedule.batch_ramp_increment_samples=6"],
            4,
            "schedule.batch_ramp_increment_samples=6 does not divide among 4 ranks; use 4 or 8",
        ),
        (
            ["schedule.batch_ramp_start_samples=32"],
            1,
            "schedule.batch_ramp_start_samples=32 is above schedule.batch_samples=16; a ramp only "
            "rises",
        ),
        (
            ["schedule.warmup_steps=500"],
            1,
            "schedule.warmup_steps=500 is longer than the run of run.steps=400; lower it or "
            "lengthen the run",
        ),
        (
            ["schedule.decay=constant"],
            1,
            "schedule.final_lr_ratio=0.1 has no effect with schedule.decay=constant; set it to 1",
        ),
        (
            ["model.num_heads=3"],
            1,
            "model.num_heads=3 does not divide model.hidden_size=128; use 2 or 4",
        ),
        (
            ["model.num_heads=128"],
            1,
            "model.num_heads=128 gives heads of odd size 1; rotary embeddings need an even one",
        ),
        (
            ["model.num_kv_heads=3"],
            1,
            "model.num_kv_heads=3 does not divide model.num_heads=4; use 1 (multi-query) up to 4",
        ),
        (
            ["model.is_parallel=false"],
            1,
            "model.num_block_norms=1 needs model.is_parallel=true; a sequential block has two "
            "norms: set model.num_block_norms=2",
        ),
        (
            ["model.vocab_size=1024"],
            1,
            "model.vocab_size=1024 is smaller than the tokenizer's 2048; set "
            "model.vocab_size=2048 or lower tokenizer.vocab_size",
        ),
        (
            ["tokenizer=bytes", "model.vocab_size=256"],
            1,
            "model.vocab_size=256 is smaller than the tokenizer's 257; set model.vocab_size=257 "
            "or lower tokenizer.vocab_size",
        ),
        (
            ["engine=single"],
            2,
            "engine.kind=single runs on one process, and 2 were started; use engine=ddp, fsdp or "
            "deepspeed, or --nproc-per-node 1",
        ),
        (
            ["engine=deepspeed", "recovery.veto=nonfinite"],
            1,
            "recovery.veto=nonfinite is impossible with engine=deepspeed: it takes its norm "
            "inside its own step, so no update can be refused from outside; set "
            "recovery.veto=off (a rewind then undoes a bad update) or use engine=fsdp",
        ),
        (
            ["engine=deepspeed", "+engine.deepspeed.zero_optimisation={}"],
            1,
            "engine.deepspeed.zero_optimisation: DeepSpeed has no such key and would silently "
            "ignore it; did you mean engine.deepspeed.zero_optimization?",
        ),
        (
            ["engine=deepspeed", "+engine.deepspeed.train_batch_size=8"],
            1,
            "engine.deepspeed.train_batch_size is set by Trimtab itself; use "
            "schedule.batch_samples instead",
        ),
        (
            ["engine=fsdp", "+engine.deepspeed.aio={}"],
            1,
            "engine.deepspeed is set, but engine.kind=fsdp; use engine=deepspeed or remove it",
        ),
        (
            ["data.paths=[/no/such/file.txt]"],
            1,
            "data.paths: /no/such/file.txt does not exist; give a file, a folder or a glob",
        ),
        (
            ["tokenizer=file"],
            1,
            "tokenizer.path is missing; tokenizer=file needs a tokenizer.json",
        ),
        (
            ["tokenizer=file", "tokenizer.path=/no/such/tokenizer.json"],
            1,
            "tokenizer.path=/no/such/tokenizer.json does not exist; give a tokenizer.json, a "
            "folder with one, or a name on the Hugging Face hub",
        ),
        (
            ["callbacks.names=[spike_detection,checkpointing]"],
            1,
            "recovery.rule=ladder needs the callback spike_recovery in callbacks.names; add it, "
            "or set recovery=none",
        ),
        (
            ["recovery=observe", "callbacks.names=[spike_detection,checkpointing]"],
            1,
            "recovery.rule=observe needs the callback spike_recovery in callbacks.names; add it, "
            "or set recovery=none",
        ),
        (
            ["recovery.ladder=[replay,veto,skip]"],
            1,
            "recovery.ladder: veto is no attempt; use some of cool, replay, skip, skip_further, "
            "in the order in which they are tried",
        ),
        (
            ["recovery=observe", "recovery.ladder=[stop]"],
            1,
            "recovery.ladder: stop is no attempt",
        ),
        (
            ["recovery.ladder=[]"],
            1,
            "recovery.ladder is empty; name at least one attempt, or use recovery=skip_step",
        ),
        (
            ["recovery=observe", "recovery.ladder=[]"],
            1,
            "recovery.ladder is empty; name at least one attempt",
        ),
        (
            ["recovery=skip_step", "recovery.veto=off"],
            1,
            "recovery.rule=skip_step only ever refuses updates, and recovery.veto=off refuses "
            "none; use recovery=ladder",
        ),
        (
            ["recovery=skip_step", "engine=deepspeed"],
            1,
            "recovery.rule=skip_step only ever refuses updates, and engine=deepspeed refuses "
            "none; use recovery=ladder",
        ),
        (
            ["checkpoint.save_at_start=false", "checkpoint.interval_steps=401"],
            1,
            "checkpoint.interval_steps=401 is longer than the run of run.steps=400 and "
            "checkpoint.save_at_start=false: recovery would have nothing to go back to",
        ),
        (["chaos=bad_data", "chaos.length=0 steps"], 1, "chaos.length is zero"),
        (
            ["integrity.reexecution_interval_steps=50", "run.is_deterministic=false"],
            1,
            "integrity.reexecution_interval_steps=50 needs run.is_deterministic=true",
        ),
        (
            ["cluster.nodes=2"],
            1,
            "cluster.nodes=2: cluster.kind=local is one machine; use 1, or cluster=slurm",
        ),
    ],
)
def test_impossible_combination_is_refused(
    arguments: list[str], world_size: int, problem: str, problems_of: Problems
) -> None:
    problems = problems_of(*arguments, world_size=world_size)
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_one_path_needs_no_list(compose_config: ComposeConfig, tmp_path: Path) -> None:
    config, _ = compose_config([f"data.paths={tmp_path}"])
    assert config.data.paths == (str(tmp_path),)


def test_glob_and_folder_of_texts_are_taken(compose_config: ComposeConfig, tmp_path: Path) -> None:
    compose_config([f"data.paths=['{tmp_path}/*.txt','{tmp_path}']"])


def test_unknown_callback_is_refused(problems_of: Problems) -> None:
    problems = problems_of("callbacks.names=[spike_detection,spike_recovery,checkpointing,nope]")
    assert len(problems) == 1
    assert "there is no callback 'nope'" in problems[0]


def test_recovery_without_its_detector_is_refused(problems_of: Problems) -> None:
    (problem,) = problems_of("callbacks.names=[spike_recovery,checkpointing,tracking]")
    assert problem.startswith("recovery.rule=ladder needs the callback spike_detection")


def test_rule_none_needs_no_recovery_callback(compose_config: ComposeConfig) -> None:
    compose_config(["recovery=none", "callbacks.names=[tracking]"])


def test_ladder_of_a_rule_that_climbs_none_may_be_empty(compose_config: ComposeConfig) -> None:
    for rule in ("falcon", "palm", "skip_step"):
        compose_config([f"recovery={rule}", "recovery.ladder=[]"])


def test_unknown_attempts_are_named_each(problems_of: Problems) -> None:
    problems = problems_of("recovery.ladder=[unskip,skip,veto,veto]")
    assert [problem.split(" is no attempt")[0] for problem in problems] == [
        "recovery.ladder: unskip",
        "recovery.ladder: veto",
    ]


def test_flag_limit_that_leaves_no_room_for_a_spike_is_refused(problems_of: Problems) -> None:
    (problem,) = problems_of("recovery.max_flagged_steps=2")
    assert problem.startswith("recovery.max_flagged_steps=2")


def test_any_number_of_problems_keeps_its_grammar() -> None:
    assert str(ConfigError(["a"])) == "1 problem in the configuration:\n  - a"
    assert str(ConfigError(["a", "b"])).startswith("2 problems")


# Differences.


def test_equal_configs_do_not_differ(compose_node: ComposeNode) -> None:
    assert differences(compose_node(), compose_node()) == []


@pytest.mark.parametrize(
    "argument",
    [
        "run.overwrite=true",
        "run.dir=elsewhere",
        "engine=fsdp",
        "checkpoint.interval_steps=7",
        "tracker=wandb",
        "cluster=slurm",
        "data.cache_dir=/elsewhere",
        "recovery=palm",
        "callbacks.names=[tracking]",
    ],
)
def test_key_that_changes_nothing_learnt_is_free(argument: str, compose_node: ComposeNode) -> None:
    assert differences(compose_node(), compose_node([argument])) == []


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("run.seed=5", "run.seed: the folder has 1234, now 5"),
        ("optim.lr=1e-4", "optim.lr: the folder has 0.003, now 0.0001"),
        ("data.packing=best_fit", "data.packing: the folder has 'concatenate', now 'best_fit'"),
        ("chaos=bad_data", "chaos.kind: the folder has 'none', now 'bad_data'"),
    ],
)
def test_key_that_matters_is_told_with_both_values(
    argument: str, line: str, compose_node: ComposeNode
) -> None:
    assert differences(compose_node(), compose_node([argument])) == [line]


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("run.steps=500", "run.steps: the folder has 400, now 500"),
        ("schedule.batch_samples=32", "schedule.batch_samples: the folder has 16, now 32"),
        ("data.sequence_length=64", "data.sequence_length: the folder has 128, now 64"),
        (
            "data.sources.a.paths=[x]",
            "data.sources.a.paths: the folder has None, now ['x']",
        ),
    ],
)
def test_key_that_may_change_on_the_way_is_told(
    argument: str, line: str, compose_node: ComposeNode
) -> None:
    assert differences(compose_node(), compose_node([argument])) == []
    assert line in allowed_changes(compose_node(), compose_node([argument]))


def test_key_that_is_new_or_gone_differs() -> None:
    old, new = {"model": {"a": 1}}, {"model": {"b": 1}}
    assert differences(old, new) == [
        "model.a: the folder has 1, now None",
        "model.b: the folder has None, now 1",
    ]


def test_differences_change_neither_side(compose_node: ComposeNode) -> None:
    old, new = compose_node(), compose_node(["run.seed=5"])
    copies = copy.deepcopy((old, new))
    differences(old, new)
    assert (old, new) == copies
