"""Configurations: stock's fields and defaults, those that are new, and the ways to give them."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class

import saelens_sparse
from saelens_sparse.architectures import ARCHITECTURES, Architecture
from tests.support.architectures import ON_CPU, SUBJECTS, Subject, subjects
from tests.support.runs import runner_config

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)

NEW_FIELDS = {
    "implementation": "auto",
    "screen_buffer_mib": 1024,
    "screen_dtype": "auto",
    "fused_adam": True,
    "gradient_buffers": False,
    "cuda_graph": True,
    "moments": None,
}


@architectures
def test_fields_and_defaults_of_stock(architecture: Architecture) -> None:
    stock: Any = architecture.stock_config(d_in=8, d_sae=200)
    sparse: Any = architecture.config(d_in=8, d_sae=200)
    for field in fields(stock):
        if field.name != "metadata":
            assert getattr(sparse, field.name) == getattr(stock, field.name), field.name
    new = {field.name for field in fields(sparse)} - {field.name for field in fields(stock)}
    own_fields = SUBJECTS[architecture.name].traits.own_fields
    assert {name: getattr(sparse, name) for name in new} == {**NEW_FIELDS, **own_fields}


@subjects(ON_CPU, options="all")
def test_class_dictionary_and_runner_config_say_the_same(
    subject: Subject, options: dict[str, Any], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "d_in": 16, "d_sae": 200, "implementation": "torch", "screen_buffer_mib": 3,
    }  # fmt: skip
    needed = subject.architecture.needed_fields(settings["d_sae"])
    cfg: Any = subject.architecture.config(**{**settings, **needed, **options})
    as_json = json.loads(json.dumps(cfg.to_dict()))
    assert as_json["architecture"] == subject.name
    for values in (cfg.to_dict(), as_json):
        assert subject.architecture.config.from_dict(values) == cfg
        sae = TrainingSAE.from_dict(values)
        assert type(sae) is subject.architecture.sae
        assert sae.cfg == cfg
    runner = LanguageModelSAERunnerConfig.from_dict(
        json.loads(json.dumps(runner_config(cfg, tmp_path).to_dict()))
    )
    assert {**runner.sae.to_dict(), "metadata": None} == {**cfg.to_dict(), "metadata": None}
    assert type(runner.sae) is subject.architecture.config


@architectures
def test_bad_values_of_new_fields_are_named(architecture: Architecture) -> None:
    settings: dict[str, Any] = {"d_in": 16, "d_sae": 128}
    bad: list[tuple[str, Any, type[Exception]]] = [
        ("implementation", "cuda", ValueError),
        ("screen_buffer_mib", 0, ValueError),
        ("screen_buffer_mib", 1.5, TypeError),
        ("fused_adam", 1, TypeError),
        ("gradient_buffers", None, TypeError),
        ("cuda_graph", "yes", TypeError),
        ("moments", "float8", ValueError),
        ("moments", torch.bfloat16, ValueError),
        ("apply_b_dec_to_input", 1, TypeError),
        ("decoder_init_norm", 0.0, ValueError),
        ("d_in", 0, ValueError),
        ("d_in", 3.0, TypeError),
        ("d_sae", -1, ValueError),
        ("dtype", "int64", ValueError),
        ("normalize_activations", "l2", ValueError),
        ("dead_latent_loss", "ghosts", ValueError),
        ("dead_latent_loss", ["ghost"], ValueError),
        ("aux_loss_coefficient", float("nan"), ValueError),
        ("aux_loss_coefficient", "1", TypeError),
    ]
    for field, value, error in bad:
        with pytest.raises(error, match=field):
            architecture.config(**{**settings, field: value})


@architectures
def test_what_dead_latents_may_be_trained_by_is_named(architecture: Architecture) -> None:
    default = SUBJECTS[architecture.name].traits.own_fields["dead_latent_loss"]
    other = {"auxk": None, None: "auxk"}[default]
    allowed = {"auxk": "one of auxk, ghost", None: "'ghost' or None"}[default]
    make: Any = architecture.config
    for value in (default, "ghost"):
        assert make(d_in=16, d_sae=128, dead_latent_loss=value).dead_latent_loss == value
    with pytest.raises(ValueError, match=rf"^dead_latent_loss must be {allowed}; got {other!r}"):
        make(d_in=16, d_sae=128, dead_latent_loss=other)


@architectures
def test_ghost_gradients_refuse_run_time_normalization(architecture: Architecture) -> None:
    make: Any = architecture.config
    settings: dict[str, Any] = {"d_in": 16, "d_sae": 128}
    works = ("none", "expected_average_only_in", "covariance_whitening")
    for normalize in works:
        make(**settings, dead_latent_loss="ghost", normalize_activations=normalize)
    for normalize in ("constant_norm_rescale", "layer_norm"):
        make(**settings, normalize_activations=normalize)
        message = (
            f"normalize_activations must be one of {', '.join(works)} with "
            f"dead_latent_loss='ghost'; got '{normalize}'"
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            make(**settings, dead_latent_loss="ghost", normalize_activations=normalize)


@architectures
def test_registration_is_idempotent(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = (architecture.sae, architecture.config)
    for _ in range(2):
        saelens_sparse.register()
    assert get_sae_training_class(architecture.name) == classes
    monkeypatch.delitem(SAE_TRAINING_CLASS_REGISTRY, architecture.name)
    saelens_sparse.register()
    assert get_sae_training_class(architecture.name) == classes
    stock = get_sae_training_class(architecture.stock)
    monkeypatch.setitem(SAE_TRAINING_CLASS_REGISTRY, architecture.name, stock)
    with pytest.raises(ValueError, match=f"{architecture.name} already registered"):
        saelens_sparse.register()


@subjects(ON_CPU)
def test_triton_is_never_replaced(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    architecture = subject.architecture
    settings: dict[str, Any] = {"d_in": 16, "d_sae": 200, "implementation": "triton"}
    settings |= architecture.needed_fields(settings["d_sae"])
    sae = architecture.sae(architecture.config(**settings))
    with pytest.raises(ValueError, match=r"implementation='triton' cannot run here: .*'torch'"):
        sae.encode(torch.zeros(4, 16))
