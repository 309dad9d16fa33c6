"""Recipes, options and overrides: names are frozen, values are checked, errors name the culprit."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from nomatmul.formats.rotary import RopeScaling
from nomatmul.train import RECIPES, TrainArgs, TrainConfig, apply_overrides, recipe
from nomatmul.train.config import COMPILES, FREE_FIELDS, differences

OPTIONS = """
recipe model sequence_length batch_size micro_batch_size batch_ramp steps time_limit seed
learning_rate schedule warmup_steps final_rate beta1 beta2 epsilon weight_decay clip_norm z_loss
mask_share full_precision teacher_share temperature teacher_top fff_balance fff_route_gradient
precision compile deterministic recompute fff_implementation loss_chunks valid_fraction
log_interval eval_interval eval_tokens sample_interval sample_tokens sample_prompt
diagnostics_interval checkpoint_interval checkpoint_seconds checkpoint_keep
"""

ARGUMENTS = """
recipe data out valid tokenizer start text_field document_start drop_document_start tokens workers
set steps time_limit seed device resume override_config force quiet json collective_timeout
"""


def test_option_names_are_frozen() -> None:
    assert [field.name for field in dataclasses.fields(TrainConfig)] == OPTIONS.split()
    assert [field.name for field in dataclasses.fields(TrainArgs)] == ARGUMENTS.split()
    assert set(OPTIONS.split()) >= FREE_FIELDS


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_valid_and_survives_a_round_trip(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_options_that_are_gone_load_where_they_were_off(config: TrainConfig) -> None:
    off = {"fff_hardening": 0.0, "fff_region_leak": 0.0, "fff_hard_at": 0.0}
    assert TrainConfig.from_dict(config.to_dict() | off) == config
    with pytest.raises(ValueError, match=r"fff_hard_at 0\.5 is no longer part of nomatmul"):
        TrainConfig.from_dict(config.to_dict() | off | {"fff_hard_at": 0.5})


@pytest.mark.parametrize(
    ("name", "layers", "width", "rate", "tokens", "millions"),
    [
        ("mmfree_370m", 24, 1024, 4e-3, 15e9, (350, 390)),
        ("mmfree_1_3b", 24, 2048, 2.5e-3, 100e9, (1250, 1400)),
        ("mmfree_2_7b", 32, 2560, 1.5e-3, 100e9, (2550, 2800)),
    ],
)
def test_published_settings(
    name: str, layers: int, width: int, rate: float, tokens: float, millions: tuple[int, int]
) -> None:
    config = recipe(name)
    model = config.model
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (layers, width, 32_000)
    assert (config.learning_rate, config.schedule) == (rate, "cosine_halved")
    assert (config.sequence_length, config.beta2, config.weight_decay) == (2048, 0.95, 0.01)
    assert config.steps * config.tokens_per_step == pytest.approx(tokens, rel=1e-4)
    assert millions[0] < model.param_count() / 1e6 < millions[1]


MATMUL_FREE = [
    name
    for name in RECIPES
    if (recipe(name).model.linear, recipe(name).model.channel_mixer) == ("ternary", "glu")
]


@pytest.mark.parametrize("name", MATMUL_FREE)
def test_each_recipe_has_a_transformer_twin_on_the_same_tokens(name: str) -> None:
    config = recipe(name)
    twin = recipe("transformer_" + name.removeprefix("mmfree_"))
    assert (twin.model.token_mixer, twin.model.linear) == ("attention", "dense")
    for field in ("sequence_length", "batch_size", "steps", "seed", "schedule"):
        assert getattr(twin, field) == getattr(config, field)
    for field in ("num_layers", "hidden_size", "vocab_size", "intermediate_size"):
        assert getattr(twin.model, field) == getattr(config.model, field)


@pytest.mark.parametrize(
    ("name", "twin"),
    [("encoder_cpu_minute", "bert_cpu_minute"), ("ultrafastbert_1x11", "crammedbert")],
)
def test_an_encoder_and_its_dense_twin_differ_in_the_channel_mixer_only(
    name: str, twin: str
) -> None:
    fast, dense = recipe(name), recipe(twin)
    assert (fast.model.channel_mixer, dense.model.channel_mixer) == ("fff", "ffn")
    differ = {text.split(":")[0] for text in differences(fast, dense)}
    trees = {"channel_mixer", "fff_trees", "fff_depth", "fff_bias"}
    assert differ == {"recipe"} | {f"model.{field}" for field in trees}


@pytest.mark.parametrize(("name", "plain"), [("union", "box"), ("union_cpu_minute", "cpu_minute")])
def test_a_union_differs_from_its_matmul_free_twin_in_the_channel_mixer_only(
    name: str, plain: str
) -> None:
    trees, glu = recipe(name), recipe(plain)
    assert (trees.model.linear, trees.model.token_mixer, trees.model.causal) == (
        "ternary", "mlgru", True,
    )  # fmt: skip
    differ = {text.split(":")[0] for text in differences(trees, glu)}
    fields = {"channel_mixer", "fff_trees", "fff_depth", "activation"}
    assert differ == {"recipe"} | {f"model.{field}" for field in fields}
    assert 0.75 < trees.model.param_count() / glu.model.param_count() <= 1.0


def test_the_box_is_what_the_study_found_and_its_twin_differs_in_the_model_only() -> None:
    """benchmarks/results/2026-11-30-recipes-largest, the cells dense-30-gains and twin-gains."""
    config, twin = recipe("box"), recipe("transformer_box")
    model = config.model
    assert (model.num_layers, model.hidden_size, model.intermediate_size) == (9, 640, 1600)
    assert (model.vocab_size, config.sequence_length, config.batch_size) == (4096, 1024, 16)
    assert (config.schedule, config.final_rate, config.weight_decay) == ("linear", 0.0, 0.1)
    assert (config.full_precision, config.learning_rate) == (0.3, 3e-3)
    assert config.steps * config.tokens_per_step == 329_990_144
    differ = {text.split(":")[0] for text in differences(config, twin)}
    assert differ == {"recipe", "learning_rate", "full_precision", "model.token_mixer",
                      "model.linear", "model.num_heads"}  # fmt: skip
    assert (twin.full_precision, twin.learning_rate) == (0.0, 1e-3)


def test_published_encoder_settings() -> None:
    """config/arch/crammed-bert-fff.yaml and config/train/bert-o4.yaml of the authors."""
    config = recipe("ultrafastbert_1x11")
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_heads) == (16, 768, 12)
    assert (model.vocab_size, model.max_position_embeddings) == (32_768, 128)
    assert (model.fff_trees, model.fff_depth) == (1, 11)
    assert (model.norm, model.norm_eps, model.positions) == ("layer", 1e-12, "sinusoidal")
    assert (config.learning_rate, config.schedule, config.clip_norm) == (1e-3, "triangle", 0.5)
    assert (config.beta2, config.epsilon, config.weight_decay) == (0.98, 1e-12, 0.01)
    assert (config.batch_size, config.batch_ramp, config.masked_tokens) == (8192, 0.6, 32)
    model = recipe("ultrafastbert_128x4").model
    assert (model.fff_trees, model.fff_depth) == (128, 4)


def test_published_transformer_rate() -> None:
    assert {recipe(f"transformer_{size}").learning_rate for size in ("370m", "1_3b", "2_7b")} == {
        3e-4
    }


def test_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'tiny'.*cpu_minute.*mmfree_2_7b"):
        recipe("tiny")
    assert recipe("mmfree-1.3B") == recipe("mmfree_1_3b")


def test_overrides_replace_fields_by_name(config: TrainConfig) -> None:
    changed = apply_overrides(
        config, ["lr=1e-3", "steps=1e3", "model.num_layers=3", "deterministic=off", "compile=on"]
    )
    assert (changed.learning_rate, changed.steps, changed.model.num_layers) == (1e-3, 1000, 3)
    assert (changed.deterministic, changed.compile) == (False, "on")
    assert changed.model.intermediate_size == config.model.intermediate_size
    assert apply_overrides(config, []) == config


def test_a_scaling_of_positions_is_an_object(config: TrainConfig) -> None:
    values = {"rope_type": "linear", "factor": 2.0}
    dials = ["model.token_mixer=attention", f"model.rope_scaling={json.dumps(values)}"]
    changed = apply_overrides(config, dials)
    assert changed.model.rope_scaling == RopeScaling("linear", 2.0)
    assert TrainConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    assert apply_overrides(changed, ["model.rope_scaling=none"]).model.rope_scaling is None


def test_a_new_width_gets_its_own_intermediate_size(config: TrainConfig) -> None:
    assert apply_overrides(config, ["model.hidden_size=512"]).model.intermediate_size == 1536


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "not of the form name=value"),
        ("speed=3", "unknown option in 'speed=3'; the options are batch_ramp, "),
        ("model.width=3", "unknown option in 'model.width=3'; the options are "),
        ("steps=many", "'many' is not a int"),
        ("steps=1.5", "'1.5' is not a int"),
        ("steps=inf", "'inf' is not a int"),
        ("model.num_layers=1e999", "'1e999' is not a int"),
        ("model.fff_layers=inf", "'inf' is no list of whole numbers"),
        ("epsilon=nan", "epsilon nan must be above 0"),
        ("epsilon=-1", "epsilon -1.0 must be above 0"),
        ("deterministic=maybe", "'maybe' is not a bool"),
        ("steps=0", "steps 0 must be at least 1"),
        ("learning_rate=0", "learning_rate 0.0 must be above 0"),
        ("learning_rate=nan", "learning_rate nan must be above 0"),
        ("batch_size=3", "batch_size 3 must be a multiple of micro_batch_size 2"),
        ("schedule=step", "schedule 'step': choose one of cosine_halved, cosine, linear"),
        ("precision=fp8", "precision 'fp8': choose one of auto"),
        ("valid_fraction=1", "valid_fraction 1.0 must be in"),
        ("loss_chunks=5", "loss_chunks 5 must divide"),
        ("model.token_mixer=rnn", "token_mixer 'rnn' is unknown"),
        ("batch_ramp=1.5", "batch_ramp 1.5 must be at most 1"),
        ("final_rate=1.5", "final_rate 1.5 must be at most 1"),
        ("full_precision=1", r"full_precision 1.0 must be in [0, 1)"),
        ("full_precision=0.95", "full_precision 0.95 of 12 steps leaves none for ternary weights"),
        ("temperature=0", "temperature 0.0 must be from 0.01 to 100.0"),
        ("temperature=1e30", "temperature 1e+30 must be from 0.01 to 100.0"),
        ("temperature=nan", "temperature nan must be from 0.01 to 100.0"),
        ("teacher_top=-1", "teacher_top -1 must be at least 0"),
        ("teacher_share=1.1", "teacher_share 1.1 must be at most 1"),
        ("teacher_share=nan", "teacher_share nan must be at least 0"),
        ("fff_balance=0.1", "fff_balance 0.1 belongs to fast feedforward layers"),
        ("model.rope_scaling=linear", "'linear' is no JSON object"),
        ('model.rope_scaling={"factor": 2}', "rope_scaling needs one rope_type"),
        ("model.fff_layers=0,x", "'0,x' is no list of whole numbers"),
    ],
)
def test_bad_overrides_name_the_culprit(config: TrainConfig, assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_overrides(config, [assignment])


def test_full_precision_is_for_models_with_ternary_weights(config: TrainConfig) -> None:
    wanted = "full_precision=0.5"
    dense = ["model.token_mixer=attention", "model.linear=dense"]
    with pytest.raises(
        ValueError, match=r"belongs to ternary layers, but model\.linear is 'dense'"
    ):
        apply_overrides(config, [*dense, wanted])
    for ternary in ([], ["model.token_mixer=attention"], [*dense[:1], "model.linear_norm=none"]):
        assert apply_overrides(config, [*ternary, wanted]).full_precision == 0.5
    assert apply_overrides(config, ["model.channel_mixer=fff", "model.fff_trees=1",
                                    "model.fff_depth=2", wanted]).full_precision == 0.5  # fmt: skip


def test_attention_cannot_be_longer_than_its_positions(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"sequence_length 4096 is above model\.max_position"):
        apply_overrides(
            config, ["model.token_mixer=attention", "model.linear=dense", "sequence_length=4096"]
        )


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["mask_share=0"], "mask_share 0.0 must be in"),
        (["mask_share=1"], "mask_share 1.0 must be in"),
        (["mask_share=0.001"], "mask_share 0.001 of sequence_length 64 masks no token"),
        (["sequence_length=65"], "sequence_length 65 is above model.max_position_embeddings 64"),
        (["loss_chunks=5"], "loss_chunks 5 must divide masked tokens x micro_batch_size (256)"),
        (["model.fff_depth=-1"], "fff_depth -1 is out of range"),
        (["model.fff_trees=0"], "fff_trees 0 is out of range"),
    ],
)
def test_bad_settings_of_encoders(assignments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        apply_overrides(recipe("encoder_cpu_minute"), assignments)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed=9223372036854775808", "seed 9223372036854775808 must be at most"),
        ("eval_tokens=0", "eval_tokens 0 must be at least 1"),
        ("epsilon=0", "epsilon 0.0 must be above 0"),
        ("compile=fast", "compile 'fast': choose one of auto, graph, on, off, default"),
        ("mask_share=0.5", "mask_share 0.5 belongs to encoders"),
        ("sample_prompt=a\udcff", r"sample_prompt 'a\\udcff' is no UTF-8 text"),
    ],
)
def test_what_would_fail_in_the_middle_of_a_run_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(recipe("cpu_minute"), [assignment])


def test_modes_of_torch_compile_are_known() -> None:
    from torch._inductor import list_mode_options

    assert set(list_mode_options()) <= set(COMPILES)


def test_some_layers_may_hold_the_trees() -> None:
    config = apply_overrides(recipe("encoder_cpu_minute"), ["model.fff_layers=2,0"])
    assert config.model.fff_layers == (0, 2)
    assert differences(recipe("encoder_cpu_minute"), config) == ["model.fff_layers: None -> (0, 2)"]


def test_differences_ignore_what_only_changes_reports(config: TrainConfig) -> None:
    other = dataclasses.replace(config, log_interval=7, checkpoint_keep=9)
    assert differences(config, other) == []
    other = apply_overrides(config, ["seed=4", "model.num_layers=5"])
    assert differences(config, other) == ["seed: 0 -> 4", "model.num_layers: 2 -> 5"]
