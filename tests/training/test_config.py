"""Configurations from TOML and the command line, and messages for mistakes."""

import json
import re
from pathlib import Path

import pytest

from whisper_nnx.training.config import EvaluateConfig, ModelConfig, TrainConfig, check, describe, differences, to_dict
from whisper_nnx.training.config_file import _fields, from_dict, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
NEEDED = ["--data.train", "a.jsonl", "--model.init", "tiny"]


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "run.toml").write_text(text)
        return tmp_path / "run.toml"

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_included_configurations_are_valid(path):
    config = load_config(path)
    assert config.data.train == ("train.jsonl",)
    assert config.output == f"runs/{path.stem}"


def test_every_key_is_explained_in_a_configuration_file():
    names = [name.rpartition(".")[2] for name in _fields()]
    text = "\n".join(path.read_text() for path in CONFIGS)
    explained = {name for name in names if re.search(rf"^{name} = .*#", text, re.MULTILINE)}
    assert set(names) == explained


def test_the_help_describes_every_key_with_its_default_and_choices():
    keys = dict(key for _, section in describe() for key in section)
    assert {name.removesuffix(".KEY") for name in keys} == set(_fields())
    assert min(len(text.partition(" (")[0]) for text in keys.values()) > 10
    assert keys["optimizer.decay"].endswith("(one of linear, cosine, constant; default: linear)")
    assert keys["data.pack_gap_s"].endswith("(default: 0.0 1.0)")
    assert "default" not in keys["model.shape.KEY"]


def test_a_run_without_a_newer_key_can_be_resumed():
    now = to_dict(TrainConfig(model=ModelConfig(init="tiny")))
    before = json.loads(json.dumps(now))
    del before["data"]["language"]
    assert differences(before, now) == []
    now["data"]["language"] = "de"
    assert differences(before, now) == ["data.language: '' -> 'de'"]


def test_missing_keys_keep_their_defaults(toml):
    config = load_config(toml('steps = 5\n[model]\ninit = "tiny"\n[data]\ntrain = ["a.jsonl"]'))
    expected = {**to_dict(TrainConfig()), "steps": 5}
    expected["model"]["init"], expected["data"]["train"] = "tiny", ["a.jsonl"]
    assert to_dict(config) == expected


def test_the_command_line_and_a_file_are_equivalent(toml):
    file = toml("""
        steps = 7
        [model]
        shape = {size = "tiny", dropout = 0.5, decoder_layers = 2}
        tokenizer = "t"
        [data]
        train = ["a.jsonl", "b.jsonl"]
        weights = [1, 2.5]
        pack = false
        pack_gap_s = [0.5, 2]
        [loss]
        guide_heads = [[1, 0], [1, 2]]
        [optimizer]
        learning_rate = 1e-3
        [evaluate]
        options = {beam_size = 1, temperature = [0.0, 0.2], suppress_tokens = "-1"}
    """)
    words = """--steps 7 --model.shape.size tiny --model.shape.dropout=0.5 --model.shape.decoder-layers 2
        --model.tokenizer t --data.train a.jsonl b.jsonl --data.weights 1 2.5 --data.pack False --data.pack-gap-s 0.5 2
        --loss.guide_heads 1:0 1:2 --optimizer.learning_rate 1e-3 --evaluate.options.beam_size 1
        --evaluate.options.temperature 0.0 0.2 --evaluate.options.suppress_tokens "-1" """
    assert load_config(None, words.split()) == load_config(file)


def test_the_command_line_takes_precedence(toml):
    file = toml('steps = 7\n[model]\ninit = "tiny"\n[data]\ntrain = ["a.jsonl"]\nworkers = 3')
    config = load_config(file, ["--data.train", "b.jsonl", "c.jsonl", "--steps", "9"])
    assert (config.steps, config.data.train, config.data.workers) == (9, ("b.jsonl", "c.jsonl"), 3)


def test_a_list_without_values_is_empty():
    config = load_config(None, [*NEEDED, "--lora.targets", "--steps", "2"])
    assert (config.lora.targets, config.steps) == ((), 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer.learnin_rate 1", "optimizer.learnin_rate is unknown; did you mean optimizer.learning_rate?"),
        ("--learning_rate 1", "learning_rate is unknown; did you mean optimizer.learning_rate?"),
        ("--optimiser.decay linear", "optimiser.decay is unknown; did you mean optimizer.decay?"),
        ("--step 3", "step is unknown; did you mean steps?"),
        ("--steps.more 3", "steps.more is unknown; did you mean steps?"),
        ("--steps many", "steps='many' must be a whole number"),
        ("--steps 2.5", "steps='2.5' must be a whole number"),
        ("--steps", "steps needs one value, but none was given"),
        ("--steps 1 2", "steps needs one value, but 1 2 was given"),
        ("--steps 0", "steps=0 must be at least 1"),
        ("--data.window_s 0", "data.window_s=0.0 must be above 0 and at most 30"),
        ("--data.window_s nan", "data.window_s=nan must be above 0 and at most 30"),
        ("--data.no_speech_rate 1.1", "data.no_speech_rate=1.1 must be at least 0 and at most 1"),
        ("--data.pack maybe", "data.pack='maybe' must be true or false"),
        ("--data.pack_gap_s 1", "data.pack_gap_s=[1.0] must be 2 values, not 1"),
        ("--data.pack_gap_s 2 1", "data.pack_gap_s=[2.0, 1.0] must be two numbers in ascending order; swap them"),
        ("--data.weights 1 2", "data.weights has 2 values but data.train has 1; give one weight each"),
        ("--data.weights -1", "data.weights=-1.0 must be above 0"),
        ("--optimizer.accumulate 0", "optimizer.accumulate=0 must be at least 1"),
        ("--optimizer.betas 0.9 1", "optimizer.betas=1.0 must be at least 0 and below 1"),
        (
            "--optimizer.decay liner",
            "optimizer.decay='liner' must be one of linear, cosine, constant; did you mean linear?",
        ),
        ("--model.dtype float16", "model.dtype='float16' must be one of float32, bfloat16; did you mean bfloat16?"),
        ("--model.shape.d_model x", "model.init and model.shape are both given; drop one"),
        ("--model.shape 3", "model.shape is a table; give its values one by one: --model.shape.KEY VALUE"),
        ("--loss.guide_heads 1-2", "loss.guide_heads='1-2' must be layer:head"),
        ("--loss.guide_weight 1", "loss.guide_weight=1.0 needs loss.guide_heads, like [[2, 0], [2, 1]]"),
        ("--evaluate.every 5", "evaluate.every=5 needs evaluate.manifest"),
        ("--lora.rank 4 --lora.targets", "lora.rank=4 needs lora.targets"),
        ("--data.train", "data.train is empty; give at least one manifest"),
        ("--model.init=", "there is no model to train; give one of model.init, model.shape, distill.teacher"),
    ],
)
def test_mistakes_on_the_command_line_name_the_value_and_the_fix(words, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_config(None, [*NEEDED, *words.split()])
    assert "\n" not in str(raised.value)


def test_a_value_without_a_name_is_rejected():
    with pytest.raises(ValueError, match=r"'a.toml' follows no option; write --name value, or --config a.toml"):
        load_config(None, ["a.toml", *NEEDED])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "is not a TOML file"),
        ("step = 3", "step is unknown; did you mean steps?"),
        ("[optimiser]\ndecay = 1", "optimiser is unknown; did you mean optimizer?"),
        ("[optimizer]\ndecay = 1", "optimizer.decay=1 must be a string"),
        ("data = 3", "data=3 must be a table of names and values"),
        ("steps = 1.0", "steps=1.0 must be a whole number"),
        ("steps = true", "steps=True must be a whole number"),
        ("[data]\ntrain = 'a.jsonl'", "data.train='a.jsonl' must be a list: ['a.jsonl']"),
        ("[data]\ntrain = [1]", "data.train=1 must be a string"),
        ("[loss]\nguide_heads = [[1]]", "loss.guide_heads=[1] must be 2 values, not 1"),
        ("[model]\nshape = 3", "model.shape=3 must be a table of names and values"),
    ],
)
def test_mistakes_in_a_file_name_the_file(toml, text, message):
    file = toml(text)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_config(file, NEEDED)
    assert str(raised.value).startswith(str(file))


def test_a_configuration_survives_json():
    config = load_config(None, [*NEEDED, "--loss.guide_heads", "1:0", "--evaluate.options.beam_size", "2"])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_only_keys_that_affect_the_weights_prevent_resuming():
    before = TrainConfig(model=ModelConfig(init="tiny"))
    harmless = ["--steps", "3", "--log_every", "1", "--data.workers", "2", "--evaluate.max_rows", "3"]
    changed = load_config(None, [*NEEDED, *harmless])
    kept = to_dict(changed)
    kept["data"]["train"] = []
    assert differences(to_dict(before), kept) == []
    assert differences(to_dict(before), {**kept, "batch_size": 3}) == ["batch_size: 8 -> 3"]
    kept["model"]["init"] = "base"
    assert differences(to_dict(before), kept) == ["model.init: 'tiny' -> 'base'"]


def test_a_shape_contains_numbers_and_the_name_of_a_size():
    words = ["--data.train", "a", "--model.tokenizer", "t", "--model.shape.size"]
    check(load_config(None, [*words, "tiny", "--model.shape.d_model", "64"]))
    with pytest.raises(ValueError, match=r"model\.shape\.size=3 must be the name of a size"):
        load_config(None, [*words, "3"])
    with pytest.raises(ValueError, match=r"model\.shape\.d_model='wide' must be a number"):
        load_config(None, [*words, "tiny", "--model.shape.d_model", "wide"])


def test_evaluation_options_are_kept_unchanged(toml):
    file = toml("[evaluate]\noptions = {language = 'en', temperature = [0.0, 0.2], beam_size = 1}")
    options = {"language": "en", "temperature": [0.0, 0.2], "beam_size": 1}
    assert load_config(file, NEEDED).evaluate == EvaluateConfig(options=options)
