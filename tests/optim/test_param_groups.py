"""`param_groups`: who gets no weight decay, how deep each parameter is, and what the groups then do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nexus.optim import FusedAdamW, param_groups
from nexus.schedules import Constant, Cosine

SIZES = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def options_of(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {k: v for k, v in group.items() if k != "params"} for group in groups for name, _ in group["params"]
    }


def model_of(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=8, **SIZES)
        )
    if kind == "bert":
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32, **SIZES
            )
        )
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **SIZES)
        )
    if kind == "swin":
        return transformers.SwinForImageClassification(
            transformers.SwinConfig(
                embed_dim=12, depths=[2, 2], num_heads=[2, 2], image_size=32, patch_size=4, window_size=4
            )
        )
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    )


DEPTHS = {  # a parameter, and by how many halvings its rate is below that of the head
    "gpt2": {
        "transformer.wte.weight": 4,
        "transformer.wpe.weight": 4,
        "transformer.h.0.attn.c_attn.weight": 3,
        "transformer.h.2.mlp.c_proj.bias": 1,
        "transformer.ln_f.weight": 0,
    },
    "bert": {
        "bert.embeddings.LayerNorm.bias": 3,
        "bert.encoder.layer.0.output.dense.weight": 2,
        "bert.encoder.layer.1.attention.self.query.weight": 1,
        "bert.pooler.dense.weight": 0,
        "classifier.bias": 0,
    },
    "t5": {
        "shared.weight": 5,
        "encoder.block.0.layer.0.layer_norm.weight": 4,
        "encoder.final_layer_norm.weight": 3,
        "decoder.block.0.layer.2.DenseReluDense.wo.weight": 2,
        "decoder.block.1.layer.0.SelfAttention.q.weight": 1,
        "decoder.final_layer_norm.weight": 0,
    },
    "swin": {
        "swin.embeddings.patch_embeddings.projection.weight": 5,
        "swin.encoder.layers.0.blocks.0.mlp.fc2.weight": 4,
        "swin.encoder.layers.0.downsample.reduction.weight": 3,
        "swin.encoder.layers.1.blocks.1.mlp.fc2.weight": 1,
        "classifier.weight": 0,
    },
    "resnet": {
        "resnet.embedder.embedder.convolution.weight": 5,
        "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight": 4,
        "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight": 2,
        "resnet.encoder.stages.1.layers.1.layer.0.normalization.bias": 1,
        "classifier.1.weight": 0,
    },
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_layer_decay_follows_the_blocks_of_real_models(kind: str) -> None:
    found = options_of(param_groups(model_of(kind), layer_decay=0.5))
    for name, halvings in DEPTHS[kind].items():
        assert found[name]["lr_scale"] == 0.5**halvings, name


@pytest.mark.parametrize("kind", DEPTHS)
def test_each_trained_parameter_is_in_one_group(kind: str) -> None:
    model = model_of(kind)
    frozen, (name, kept) = next(model.parameters()), list(model.named_parameters())[-1]
    frozen.requires_grad_(False)
    groups = param_groups(model, layer_decay=0.9)
    grouped = [param for group in groups for _, param in group["params"]]
    trained = [param for param in model.parameters() if param.requires_grad]
    assert len(grouped) == len(trained)
    assert set(grouped) == set(trained)
    assert any(each is kept for each in grouped), name


def test_biases_norms_and_embeddings_have_no_decay() -> None:
    found = options_of(param_groups(model_of("gpt2"), weight_decay=0.1, no_decay=("bias", "norm", "embedding")))
    assert all("lr_scale" not in options for options in found.values())
    for name, options in found.items():
        spared = name.endswith("bias") or ".ln_" in name or ".wte." in name or ".wpe." in name
        assert options["weight_decay"] == (0.0 if spared else 0.1), name
    kept = options_of(param_groups(model_of("gpt2"), weight_decay=0.1, no_decay=()))
    assert all(options["weight_decay"] == 0.1 for options in kept.values())


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ModuleList(Expert() for _ in range(3))


def test_experts_are_no_blocks() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(Mixture() for _ in range(2)), "head": nn.Linear(4, 1)})
    found = options_of(param_groups(model, layer_decay=0.5))
    block = {name: name.split(".")[1] if name.startswith("blocks") else "head" for name in found}
    scales = {block[name]: options["lr_scale"] for name, options in found.items()}
    assert scales == {"0": 0.25, "1": 0.5, "head": 1.0}


def test_rates_are_those_of_torch_with_the_rates_multiplied() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)]
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*blocks), nn.Linear(8, 1)).double()
    twin = copy.deepcopy(model)
    schedule = Cosine(peak_lr=1e-2, total_steps=20)
    ours = FusedAdamW(param_groups(model, weight_decay=0.1, layer_decay=0.5), lr=schedule)
    theirs = torch.optim.AdamW(param_groups(twin, weight_decay=0.1, layer_decay=0.5, lr=1.0))
    scales = [group["lr"] for group in theirs.param_groups]
    inputs = torch.randn(16, 4, dtype=torch.float64)
    for step in range(10):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
        for group, scale in zip(theirs.param_groups, scales, strict=True):
            group["lr"] = schedule(step) * scale
        ours.step()
        theirs.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_overrides_are_taken_as_they_are() -> None:
    model = model_of("bert")
    groups = param_groups(
        model, layer_decay=0.5, overrides={"classifier.*": {"lr_scale": 10.0}, "*.bias": {"eps": 1e-6}}
    )
    found = options_of(groups)
    assert found["classifier.weight"]["lr_scale"] == 10.0
    assert found["classifier.bias"] == {"weight_decay": 0.0, "lr_scale": 10.0, "eps": 1e-6}
    assert "eps" not in found["bert.pooler.dense.weight"]
    FusedAdamW(groups, lr=Cosine(peak_lr=1e-3, total_steps=10))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layer_decay": 0.0}, "layer_decay must be a number above 0 and at most 1"),
        ({"layer_decay": 0.9}, "layer_decay needs blocks"),
        ({"no_decay": "bias"}, "no_decay must be a tuple"),
        ({"no_decay": ("biases",)}, "no_decay must be a tuple"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"lr": -1.0}, "lr must be"),
        ({"overrides": {"head.*": {"lr": 1.0}}}, r"'head\.\*', which no trained parameter matches; one is 'weight'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        param_groups(nn.Linear(2, 2), **arguments)


def test_what_is_no_model_or_has_nothing_to_train_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        param_groups(list(nn.Linear(2, 2).parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"lr must be a number or None, .*give the Schedule to FusedAdamW, as lr"):
        param_groups(nn.Linear(2, 2), lr=Constant(1e-3))
    with pytest.raises(ValueError, match="nothing to optimize"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))


def test_biases_are_those_that_are_called_so() -> None:
    found = options_of(param_groups(nn.TransformerEncoderLayer(8, 2, 16), weight_decay=0.1))
    assert found["self_attn.in_proj_bias"]["weight_decay"] == 0.0
    assert found["self_attn.in_proj_weight"]["weight_decay"] == 0.1
    assert options_of(param_groups(nn.LSTM(2, 3), weight_decay=0.1))["bias_hh_l0"]["weight_decay"] == 0.0


def test_the_last_block_has_a_lower_rate_than_a_head_that_is_not_there() -> None:
    found = options_of(param_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), layer_decay=0.5))
    assert [found[name]["lr_scale"] for name in ("0.weight", "1.weight")] == [0.25, 0.5]


@pytest.mark.parametrize("overrides", [[("0.*", {})], {"*": 2.0}])
def test_overrides_are_dicts_of_dicts(overrides: Any) -> None:
    with pytest.raises(TypeError, match="overrides must be a dict of dicts"):
        param_groups(nn.Linear(2, 2), overrides=overrides)
