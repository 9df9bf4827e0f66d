"""Configuration files and key=value arguments: what is read, what is refused, and in which words."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from mxdist.config import Config, dump_config, load_config
from mxdist.config.schema import ArithmeticData, Dapo, DrGrpo, Gsm8kData, Gspo, RecipeName, Rloo
from mxdist.errors import UserError
from mxdist.quant.recipe import PRESETS

FILE = """\
run:
  seed: 3
model:
  rope_theta: 1e4
algorithm:
  clip_low: 0.1
optimizer: {lr: 1e-6}
aqn:
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.replace(str(file), "FILE")


def test_a_file_changes_defaults_and_arguments_change_the_file(file: Path) -> None:
    config = load_config(file, ["run.seed=5", "algorithm.clip_high=0.5", "log.wandb=offline", "cluster.address=null"])
    assert (config.run.seed, config.run.steps, config.algorithm.clip_low) == (5, 100, 0.1)  # type: ignore[union-attr]
    assert config.algorithm.clip_high == 0.5  # type: ignore[union-attr]
    assert config.optimizer.lr == 1e-6
    assert config.model.rope_theta == 10_000.0
    assert config.aqn == Config().aqn


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("2E3", 2e3), (".5", 0.5), ("3", 3.0), ("1e+2", 100.0), ("0.25", 0.25), ("1.", 1.0)],
)
def test_numbers_are_read_in_every_common_spelling(file: Path, text: str, value: float) -> None:
    assert load_config(file, [f"optimizer.lr={text}"]).optimizer.lr == value


@pytest.mark.parametrize("text", ["off", "no", "2026-01-02", "1:30", "0x1f", "true.", "e5"])
def test_what_is_no_number_in_yaml_1_2_is_text(file: Path, text: str) -> None:
    assert load_config(file, [f"log.wandb_project={text}"]).log.wandb_project == text


def test_a_leading_zero_is_no_octal_number(file: Path) -> None:
    assert load_config(file, ["run.seed=010"]).run.seed == 10


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(data=Gsm8kData(train="a.jsonl", eval="openai/gsm8k"), algorithm=Dapo(max_extra_batches=5)),
        Config(data=ArithmeticData(digits=3), algorithm=Rloo(tis_cap=None)),
        Config(algorithm=Gspo(clip_low=1.2345678901234567e-4), run={"dir": "runs/été", "name": "1"}),  # type: ignore[arg-type]
        Config(algorithm=DrGrpo(), optimizer={"lr": 1e-300, "eps": 123456789.125}),  # type: ignore[arg-type]
    ],
)
def test_a_resolved_configuration_reads_back_equal(config: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_relative_data_paths_become_absolute_so_that_a_run_resumes_anywhere(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    config = load_config(file, ["data={task: gsm8k, train: train.jsonl, eval: openai/gsm8k}"])
    assert (config.data.train, config.data.eval) == (str(tmp_path / "train.jsonl"), "openai/gsm8k")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("run.sed=1", "unknown key run.sed (the command line); did you mean run.seed?"),
        ("steps=5", "unknown key steps (the command line); did you mean run.steps?"),
        ("aglorithm.name=dapo", "unknown key aglorithm (the command line); did you mean algorithm?"),
        ("aqn.sigma_strat=2", "unknown key aqn.sigma_strat (the command line); did you mean aqn.sigma_start?"),
        ("reward.zzz=1", "unknown key reward.zzz (the command line); the keys of reward are workers"),
        ("run.seed.x=1", "unknown key run.seed.x (the command line): run.seed has no keys"),
        ("run=5", "run=5 (the command line) must be a group of keys"),
        (
            "algorithm=dapo",
            "algorithm=dapo (the command line) must be a group of keys; did you mean algorithm.name=dapo?",
        ),
        ("recipe_overrides=3", "recipe_overrides=3 (the command line) must be a list"),
        ("run.steps=abc", "run.steps=abc (the command line) must be a whole number"),
        ("run.steps=1.5", "run.steps=1.5 (the command line) must be a whole number"),
        ("run.steps=true", "run.steps=true (the command line) must be a whole number"),
        ("run.steps=0", "run.steps=0 (the command line) must be greater than 0"),
        ("run.steps=", "run.steps=null (the command line) must be a whole number"),
        ("run.name=5", "run.name=5 (the command line) must be text (put it in quotes)"),
        ("optimizer.lr=fast", "optimizer.lr=fast (the command line) must be a number"),
        ("optimizer.lr=.inf", "optimizer.lr=inf (the command line) must be a finite number"),
        ("optimizer.beta1=1.5", "optimizer.beta1=1.5 (the command line) must be less than 1"),
        ("log.tensorboard=yes", "log.tensorboard=yes (the command line) must be true or false"),
        (
            "recipe=mxfp",
            "recipe=mxfp (the command line) must be one of bf16, mxfp4, mxfp4_mbs, mxfp4_of, mxfp4_mbs_of, mxfp4_g4, "
            "mxfp4_mbs_g4, mxfp4_of_g4, mxfp4_mbs_of_g4, mxfp4_g4_nearest; did you mean mxfp4?",
        ),
        ("algorithm.name=ppo", "algorithm.name=ppo (the command line) must be one of grpo, dapo, dr_grpo, gspo, rloo"),
        ("data.task=math", "data.task=math (the command line) must be one of arithmetic, gsm8k"),
        (
            "algorithm.name=rloo",
            "algorithm.clip_low (FILE line 6) belongs to algorithm.name=grpo/dapo/dr_grpo/gspo, not to rloo; "
            "remove it or change algorithm.name",
        ),
        (
            "algorithm.max_extra_batches=1",
            "algorithm.max_extra_batches (the command line) belongs to algorithm.name=dapo, not to grpo; "
            "remove it or change algorithm.name",
        ),
        (
            "data.task=gsm8k",
            "data.train is missing; data.task=gsm8k (the command line) needs it: Path of train.jsonl, or a Hugging "
            "Face dataset name such as openai/gsm8k",
        ),
        ("data={task: gsm8k, trian: a}", "unknown key data.trian (the command line); did you mean data.train?"),
        ("run.seed", "the command line: 'run.seed' is no key=value; write for example run.seed=1"),
        ("=1", "the command line: '=1' is no key=value; write for example run.seed=1"),
        ("run..seed=1", "the command line: 'run..seed=1' is no key=value; write for example run.seed=1"),
        (
            "learner.ranks=3",
            "learner.expert_parallel=2 does not divide learner.ranks=3; choose a divisor of 3 "
            "(FILE and the command line)",
        ),
        (
            "model.num_attention_heads=3",
            "num_key_value_heads=2 does not divide num_attention_heads=3; choose a divisor "
            "(section model of FILE line 3 and the command line)",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(file: Path, override: str, sentence: str) -> None:
    assert refusal(file, override) == sentence


def test_an_invalid_value_is_quoted_with_its_key(file: Path) -> None:
    assert refusal(file, "run.seed=[1").startswith("the command line, run.seed: '[1' is not a valid YAML value")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run:\n  sed: 1\n", "unknown key run.sed (FILE line 2); did you mean run.seed?"),
        ("run:\n  steps: many\n", "run.steps=many (FILE line 2) must be a whole number"),
        ("run:\n  seed: 1\n  seed: 2\n", "FILE line 3: run.seed stands there and on line 2; keep one of them"),
        ("run: {seed: 1}\nrun: {steps: 2}\n", "FILE line 2: run stands there and on line 1; keep one of them"),
        (
            "learner:\n  ranks: 3\n",
            "learner.expert_parallel=2 does not divide learner.ranks=3; choose a divisor of 3 (FILE)",
        ),
        ("- 1\n", "FILE holds no keys; write settings such as 'run: {seed: 0}'"),
        ("a: b: c", "FILE line 1: not valid YAML (mapping values are not allowed here); mend that line"),
        (
            "run:\n\tseed: 1\n",
            "FILE line 2: not valid YAML (found character '\\t' that cannot start any token); mend that line",
        ),
        ("run: &a\n  x: *a\n", "FILE line 1: run.x contains itself; remove the alias"),
        ("{[1]: 2}", "FILE line 1: a key is a name, not a list or a mapping; mend that line"),
        (
            "run: !!python/object:os.system {}",
            "FILE line 1: the tag tag:yaml.org,2002:python/object:os.system means nothing here; remove it",
        ),
        (
            "data:\n  task: gsm8k\n  eval: x\n",
            "data.train is missing; data.task=gsm8k (FILE line 2) needs it: Path of train.jsonl, or a Hugging Face "
            "dataset name such as openai/gsm8k",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence_with_its_line(file: Path, text: str, sentence: str) -> None:
    file.write_text(text)
    assert refusal(file) == sentence


def test_a_file_that_cannot_be_read_is_the_users_error(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.yaml")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xe9}")
    assert "is not UTF-8" in refusal(tmp_path / "latin.yaml")
    (tmp_path / "zero.yaml").write_bytes(b"run:\0")
    assert "not valid YAML" in refusal(tmp_path / "zero.yaml")


def test_yaml_merge_keys_are_not_taken_for_repeated_keys(file: Path) -> None:
    file.write_text("run: &base {seed: 1, steps: 2}\naqn: {}\n")
    assert load_config(file).run.steps == 2
    file.write_text("deadlines:\n  <<: &slow {start: 9, rollout: 9}\n  start: 10\n")
    assert (load_config(file).deadlines.start, load_config(file).deadlines.rollout) == (10, 9)


def test_a_mistake_is_found_within_two_seconds_and_without_ray_or_torch(file: Path) -> None:
    code = (
        "import sys\nfrom mxdist.config import load_config\nfrom mxdist.errors import UserError\n"
        "try:\n    load_config(sys.argv[1], ['run.sed=1'])\nexcept UserError as error:\n    print(error)\n"
        "print(sorted({'ray', 'torch', 'vllm', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # of the processor: others may be busy
    run = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 2
    assert run.stdout.splitlines()[1] == "[]"
    assert "did you mean run.seed?" in run.stdout


def test_the_recipes_that_can_be_chosen_are_the_presets_of_the_quantiser() -> None:
    assert get_args(RecipeName) == tuple(PRESETS)


def test_an_engine_sleeps_only_where_it_shares_a_gpu_with_a_learner_that_waits(file: Path) -> None:
    shared = (
        "rollout.gpus_per_worker=0.5",
        "learner.gpus_per_rank=0.5",
        "learner.ranks=1",
        "learner.expert_parallel=1",
    )
    assert load_config(file, ["rollout.sleep=true", *shared]).rollout.sleep
    assert "share none; set both between 0 and 1, or rollout.sleep=false" in refusal(file, "rollout.sleep=true")
    assert "does not go with rollout.max_lag=1" in refusal(file, "rollout.sleep=true", *shared, "rollout.max_lag=1")
    few = ("rollout.workers=4", "algorithm.prompts_per_step=2")
    assert "nothing to sample; set fewer workers" in refusal(file, "rollout.sleep=true", *shared, *few)


def test_weights_go_in_flight_only_where_engines_sample_meanwhile(file: Path) -> None:
    in_flight = "sync.update=in_flight"
    assert load_config(file, [in_flight, "rollout.max_lag=1"]).sync.update == "in_flight"
    assert "set rollout.max_lag=1 or more, or sync.update=drained" in refusal(file, in_flight)


def test_weights_are_broadcast_only_to_processes_with_whole_gpus_that_come_at_the_same_time(file: Path) -> None:
    broadcast = "sync.transport=broadcast"
    assert load_config(file, [broadcast, "rollout.max_lag=1"]).sync.transport == "broadcast"
    assert "set sync.transport=ipc" in refusal(file, broadcast, "rollout.gpus_per_worker=0.5")
    assert "set sync.update=drained" in refusal(file, broadcast, "rollout.max_lag=1", "sync.update=in_flight")


def test_an_engine_is_divided_only_where_no_group_is_cut_that_is_quantised_together(file: Path) -> None:
    halves = "rollout.tensor_parallel=2"
    assert load_config(file, [halves, "recipe=mxfp4"]).rollout.tensor_parallel == 2
    assert "would cut model.num_attention_heads * model.head_dim=128 inside a group of 128" in refusal(file, halves)
    assert "does not divide model.num_key_value_heads=2" in refusal(file, "rollout.tensor_parallel=4", "recipe=mxfp4")
    one_gpu = refusal(file, halves, "recipe=mxfp4", "rollout.gpus_per_worker=1")
    assert "takes as many GPUs, and rollout.gpus_per_worker=1; set it to 2" in one_gpu
