"""Live models of every family except OLMo-2, and classifiers, equal those of transformers.

At every layout these tests compare logits, the gradient of every tensor, and every exported bit.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from launching import run_script
from live_layouts import (
    LAYOUTS,
    Layout,
    Step,
    digest,
    hf_tensors,
    labels_of,
    sizes,
    stored_names,
    worst,
)
from test_live_gradients import TOLERANCE, errors
from test_live_parity import logit_errors
from test_live_weights import digests_of, read
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, synth, verify

pytest_plugins = ["live_runs"]

FAMILY_LAYOUTS = {name: LAYOUTS[name] for name in ("tp1", "tp2", "tp2-sp", "pp2")} | {
    "ep2": Layout(2, {"expert_model_parallel_size": 2}),
    # Tensor parallelism shards attention but not experts: each rank has whole experts.
    "tp2-sp-ep2": Layout(
        2,
        LAYOUTS["tp2-sp"].fields
        | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
}
MIXTURES = ("olmoe-tiny", "flex-olmo-tiny")
FAMILIES = ("olmo-tiny", "olmo3-tiny", *MIXTURES, "gpt2-tiny")
CASES = [
    (family, layout)
    for family in FAMILIES
    for layout in FAMILY_LAYOUTS
    if "ep2" not in layout or family in MIXTURES
]
UNTRAINED = [(family, "tp2") for family in MIXTURES]
"""megatron-core refuses to train experts at tensor parallelism without sequence parallelism."""

ROWS, COLUMNS = 4, 64
"""Shape of the batches: longer than olmo3-tiny's window (16) and original context (32)."""
WORDS = range(2, 1000)
"""Upper bound of token ids, valid in every family's vocabulary; none is ``PAD``."""

CLASSIFIERS = {"olmo": "olmo-tiny", "olmo2": "olmo2-tiny", "olmo3": "olmo3-tiny"}
"""Language model from which each classifier is made."""
CLASSIFIER_LAYOUTS = ("tp1", "tp2-sp", "pp2")
CLASSIFIER_CASES = [(family, layout) for family in CLASSIFIERS for layout in CLASSIFIER_LAYOUTS]
CLASSES, NEW_CLASSES, PAD = 5, 3, 0
PROBLEMS = {"regression": 1, "multi_label_classification": CLASSES}
"""Further problem types of OLMo-2 classifiers, with their number of labels."""
PROBLEM_CASES = [(problem, layout) for problem in PROBLEMS for layout in CLASSIFIER_LAYOUTS]
LENGTHS = (COLUMNS, 41, 18, 1)
"""Lengths of the sequences in the classifiers' batch."""

MUTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "olmo3-tiny": {
        "yarn everywhere": {"yarn everywhere": True},
        "yarn nowhere": {"full_attention_rope": None},
        "no attention factor": {"full_attention_rope": {"attention_factor": 1.0}},
        "window one wider": {"window_size": (16, 0)},
        "window one narrower": {"window_size": (14, 0)},
    },
    "olmo-tiny": {"not clipped": {"clip_qkv": None}},
    "olmoe-tiny": {
        "not clipped": {"clip_qkv": None},
        "weights that sum to one": {"moe_router_pre_softmax": False},
    },
    "flex-olmo-tiny": {"weights that sum to one": {"moe_router_pre_softmax": False}},
}
"""Provider fields with the values that a wrong port of the family would have."""
MUTANT_CASES = [(family, name) for family, names in MUTANTS.items() for name in names]


# ------------------------------------------------------------------------------ what is looked at


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(WORDS.start, WORDS.stop, (ROWS, COLUMNS), generator=generator)


def padded() -> torch.Tensor:
    """Return sequences padded on the right, then padded on the left: [2 * ROWS, COLUMNS]."""
    right, left = torch.full((2, ROWS, COLUMNS), PAD)
    for row, (sequence, length) in enumerate(zip(tokens(), LENGTHS, strict=True)):
        right[row, :length] = left[row, COLUMNS - length :] = sequence[:length]
    return torch.cat([right, left])


def classes() -> torch.Tensor:
    return torch.arange(2 * ROWS) % CLASSES


def targets(problem: str) -> torch.Tensor:
    """Return labels of a problem type: [2 * ROWS] if each is one value, else [2 * ROWS, labels]."""
    if problem == "regression":
        return torch.linspace(-1, 1, 2 * ROWS)
    return torch.arange(2 * ROWS * CLASSES).reshape(-1, CLASSES).remainder(3).eq(0).float()


@pytest.fixture(scope="session")
def families(shared: Path) -> Path:
    """Folder of Hugging Face models, named by size, and classifiers such as ``olmo-classifier``."""
    return make_once(shared / "families", make_families)


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    from live_runs import once  # only after pytest has imported it as a plugin

    return once(folder, make)


def make_families(root: Path) -> None:
    for name in {*FAMILIES, *CLASSIFIERS.values()}:
        # Weights of this seed give large logits in all families.
        synth(name, root / name, dtype="float32", seed=1, max_shard_size="1MB")
    generator = torch.Generator().manual_seed(3)
    for family, size in CLASSIFIERS.items():
        # The backbone is the language model's, with its random norm gains. OLMo's embedding was
        # tied to its head, as in OLMo 1B; a classifier has no such head and nothing to tie.
        model = AutoModelForSequenceClassification.from_pretrained(
            root / size, num_labels=CLASSES, pad_token_id=PAD, tie_word_embeddings=family == "olmo"
        )
        model.score.weight.data.normal_(0, 0.1, generator=generator)
        model.save_pretrained(root / f"{family}-classifier")
    for problem, count in PROBLEMS.items():
        model = AutoModelForSequenceClassification.from_pretrained(
            root / "olmo2-tiny", num_labels=count, pad_token_id=PAD, problem_type=problem
        )
        model.score.weight.data.normal_(0, 0.02, generator=generator)
        model.save_pretrained(root / problem)


def launch(
    processes: int, families: Path, shared: Path, more: Callable[[Path], list[Step]]
) -> Path:
    """Return results of every case of this world size and of ``more`` steps, from one launch."""

    def make(root: Path) -> None:
        steps = more(root)
        for family, layout in CASES:
            if FAMILY_LAYOUTS[layout].processes == processes:
                steps.append(language_model(family, layout, families, root))
        for family, layout in CLASSIFIER_CASES:
            if FAMILY_LAYOUTS[layout].processes == processes:
                model, labels = f"{family}-classifier", classes()
                steps.append(classifier(model, layout, families, root, labels))
        for problem, layout in PROBLEM_CASES:
            if FAMILY_LAYOUTS[layout].processes == processes:
                labels = targets(problem)
                steps.append(classifier(problem, layout, families, root, labels))
        steps.sort(key=lambda step: sizes(step["fields"]))  # equal sizes share process groups
        print(run_script("family_model", json.dumps(steps, default=str), processes=processes))

    return make_once(shared / f"families-with-{processes}", make)


def language_model(family: str, layout: str, families: Path, root: Path) -> Step:
    fields: dict[str, Any] = dict(FAMILY_LAYOUTS[layout].fields)
    if family in MIXTURES:
        # transformers' loss has no such parts either
        fields |= {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}
    return {
        "action": "language_model",
        "hf": families / family,
        "fields": fields,
        "out": root / family / layout,
        "tokens": tokens().tolist(),
        "saves": saves(family, layout),
        "trains": (family, layout) not in UNTRAINED,
    }


def classifier(model: str, layout: str, families: Path, root: Path, labels: torch.Tensor) -> Step:
    return {
        "action": "classifier",
        "hf": families / model,
        "fields": FAMILY_LAYOUTS[layout].fields,
        "out": root / model / layout,
        "tokens": padded().tolist(),
        "labels": labels.tolist(),
        "saves": layout == "tp2-sp",
    }


def saves(family: str, layout: str) -> bool:
    """Return whether this is the layout at which the family saves a checkpoint."""
    return layout == ("ep2" if family in MIXTURES else "tp2-sp")


@pytest.fixture(scope="session")
def families_with_1(families: Path, shared: Path) -> Path:
    def step(action: str, model: str, out: Path, **options: Any) -> Step:
        return {"action": action, "hf": families / model, "fields": {}, "out": out, **options}

    return launch(
        1,
        families,
        shared,
        lambda root: [
            *(
                step(
                    "mutants",
                    family,
                    root / family / "mutants",
                    tokens=tokens().tolist(),
                    mutants=mutants,
                )
                for family, mutants in MUTANTS.items()
            ),
            *(
                step(
                    "no_padding",
                    f"{family}-classifier",
                    root / f"{family}-no-padding",
                    tokens=tokens().tolist(),
                )
                for family in CLASSIFIERS
            ),
            *(
                step("new_head", size, root / f"{family}-new-head", num_labels=NEW_CLASSES)
                for family, size in CLASSIFIERS.items()
            ),
        ],
    )


@pytest.fixture(scope="session")
def families_with_2(families: Path, shared: Path) -> Path:
    return launch(2, families, shared, lambda root: [])


def results(request: pytest.FixtureRequest, model: str, layout: str) -> Path:
    """Return the folder with the results of a model at a layout."""
    processes = FAMILY_LAYOUTS[layout].processes
    root: Path = request.getfixturevalue(f"families_with_{processes}")
    return root / model / layout


@pytest.fixture
def run(family: str, layout: str, request: pytest.FixtureRequest) -> Path:
    """Folder with the results of a family's language model at a layout."""
    return results(request, family, layout)


@pytest.fixture
def classifier_run(family: str, layout: str, request: pytest.FixtureRequest) -> Path:
    """Folder with the results of a family's classifier at a layout."""
    return results(request, f"{family}-classifier", layout)


# ------------------------------------------------------------------------ what transformers gives


def gradients_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return gradients by tensor name in files; transformers stacks experts only in memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: tensor.clone() for name, tensor in hf_tensors(Path(folder)).items()}


@cache
def expected(folder: Path) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """Return transformers' logits of a language model, and the loss with its gradients."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    logits = model(tokens()).logits
    loss = cross_entropy(logits.flatten(0, 1), labels_of(tokens()).flatten())
    loss.backward()
    return logits.detach(), loss.item(), gradients_of(model)


def load_classifier(folder: Path) -> PreTrainedModel:
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


@cache
def expected_classes(folder: Path) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """Return transformers' logits, loss and gradients of a classifier for padded sequences."""
    model, batch = load_classifier(folder), padded()
    logits = model(batch, attention_mask=(batch != PAD).long()).logits
    loss = cross_entropy(logits, classes())
    loss.backward()
    return logits.detach(), loss.item(), gradients_of(model)


# --------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_reveal_mistakes(families: Path, family: str) -> None:
    """A model with zero weights, or with gains of one and biases of zero, would hide mistakes."""
    logits, _, gradients = expected(families / family)
    assert logits.abs().max() >= 1
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    for name, tensor in hf_tensors(families / family).items():
        assert tensor.std() > 0.01, name


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_logits_equal_those_of_transformers(
    families: Path, family: str, layout: str, run: Path
) -> None:
    check_logits(run, layout, expected(families / family)[0])


def check_logits(run: Path, layout: str, logits: torch.Tensor) -> None:
    poisoned = json.loads((run / "poisoned.json").read_text())
    assert poisoned == [True] * FAMILY_LAYOUTS[layout].processes, "NaN, until it is loaded"
    ranks = torch.load(run / "logits.pt")
    assert len(ranks) == FAMILY_LAYOUTS[layout].tensor * FAMILY_LAYOUTS[layout].data
    _, error = worst(logit_errors(ranks, logits))
    print(f"largest logit error {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize(("family", "mutant"), MUTANT_CASES)
def test_wrong_arithmetic_is_detected(
    families: Path, families_with_1: Path, family: str, mutant: str
) -> None:
    """The logit check fails clearly on models with typical porting mistakes."""
    logits = torch.load(families_with_1 / family / "mutants" / f"{mutant}.pt")
    _, error = worst(logit_errors([logits], expected(families / family)[0]))
    print(f"largest logit error {error:.1e}")
    assert error > 1e-2


# ------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("family", "layout"), [case for case in CASES if case not in UNTRAINED])
def test_gradients_equal_those_of_transformers(
    families: Path, family: str, layout: str, run: Path
) -> None:
    _, loss, gradients = expected(families / family)
    check_gradients(run, loss, gradients)


def check_gradients(run: Path, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    found = torch.load(run / "gradients.pt")
    name, error = worst(errors(run, gradients))
    # Ranks that hold copies of a parameter must take the same step, or the copies diverge.
    copy, difference = worst(found["copies"]) if found["copies"] else ("none", 0.0)
    print(f"largest relative error {error:.1e} ({name}), copies {difference:.1e} ({copy})")
    assert abs(found["loss"] - loss) <= 1e-5
    assert error <= TOLERANCE, name
    assert difference <= TOLERANCE, copy


# --------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_an_exported_model_equals_the_loaded_one(
    families: Path, family: str, layout: str, run: Path
) -> None:
    assert read(run / "exported.json") == digests_of(families / family)
    assert list(read(run / "exported.json")) == stored_names(families / family)


@pytest.mark.parametrize(("family", "layout"), [case for case in CASES if saves(*case)])
def test_a_saved_checkpoint_holds_the_same_model(
    families: Path, family: str, layout: str, run: Path
) -> None:
    check_saved(families / family, run)


def check_saved(hf: Path, run: Path) -> None:
    found = verify(hf, run / "megatron")
    assert found.equal, found.differences
    assert found.compared == len(stored_names(hf))


# ----------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_classifiers_reveal_mistakes(families: Path, family: str) -> None:
    """In transformers, attending to padding or taking it for the last token changes the logits."""
    model, batch = load_classifier(families / f"{family}-classifier"), padded()
    logits, _, gradients = expected_classes(families / f"{family}-classifier")
    assert logits.shape == (2 * ROWS, CLASSES)
    assert logits.abs().max() >= 1
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    right, left = logits.chunk(2)
    assert (right - left).abs().max() <= 1e-5, "the side that is padded does not matter"
    with torch.no_grad():
        seen = model(batch).logits
    assert (seen - logits).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "layout"), CLASSIFIER_CASES)
def test_class_logits_equal_those_of_transformers(
    families: Path, family: str, layout: str, classifier_run: Path
) -> None:
    logits, _, _ = expected_classes(families / f"{family}-classifier")
    check_logits(classifier_run, layout, logits)


@pytest.mark.parametrize(("family", "layout"), CLASSIFIER_CASES)
def test_gradients_of_classifiers_equal_those_of_transformers(
    families: Path, family: str, layout: str, classifier_run: Path
) -> None:
    _, loss, gradients = expected_classes(families / f"{family}-classifier")
    assert "score.weight" in gradients
    check_gradients(classifier_run, loss, gradients)


@pytest.mark.parametrize(("problem", "layout"), PROBLEM_CASES)
def test_losses_of_other_problem_types_equal_those_of_transformers(
    families: Path, problem: str, layout: str, request: pytest.FixtureRequest
) -> None:
    model, batch = load_classifier(families / problem), padded()
    loss = model(batch, attention_mask=(batch != PAD).long(), labels=targets(problem)).loss
    loss.backward()
    assert loss > 0.1
    check_gradients(results(request, problem, layout), loss.item(), gradients_of(model))


@pytest.mark.parametrize(("family", "layout"), CLASSIFIER_CASES)
def test_exported_classifiers_equal_the_loaded_ones(
    families: Path, family: str, layout: str, classifier_run: Path
) -> None:
    hf = families / f"{family}-classifier"
    assert read(classifier_run / "exported.json") == digests_of(hf)
    assert list(read(classifier_run / "exported.json")) == stored_names(hf)
    if layout == "tp2-sp":
        check_saved(hf, classifier_run)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_transformers_reads_classifiers_converted_offline(
    families: Path, family: str, tmp_path: Path
) -> None:
    hf, megatron, again = families / f"{family}-classifier", tmp_path / "megatron", tmp_path / "hf"
    import_checkpoint(hf, megatron)
    export_checkpoint(megatron, again)
    batch = padded()
    mask = (batch != PAD).long()
    with torch.no_grad():
        before, after = (load_classifier(f)(batch, attention_mask=mask).logits for f in (hf, again))
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_several_sequences_need_a_padding_token(
    families: Path, families_with_1: Path, family: str
) -> None:
    """Without a padding token, both transformers and this package read a single sequence to its
    end."""
    run = families_with_1 / f"{family}-no-padding"
    model = load_classifier(families / f"{family}-classifier")
    model.config.pad_token_id = None
    with torch.no_grad():
        logits = model(tokens()[:1]).logits
    with pytest.raises(ValueError, match="no padding token"):
        model(tokens()[:2])
    _, error = worst(logit_errors([torch.load(run / "logits.pt")], logits))
    assert error <= 1e-5
    assert "needs pad_token_id" in json.loads((run / "refused.json").read_text())


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_new_head_is_zeros_over_the_same_backbone(
    families: Path, families_with_1: Path, family: str
) -> None:
    language_model = hf_tensors(families / CLASSIFIERS[family])
    old_head = language_model.pop("lm_head.weight")
    expected = language_model | {"score.weight": torch.zeros(NEW_CLASSES, old_head.shape[1])}
    run = families_with_1 / f"{family}-new-head"
    digests = {name: digest(tensor) for name, tensor in expected.items()}
    assert read(run / "exported.json") == digests_of(run / "hf") == digests
    with torch.no_grad():
        logits = load_classifier(run / "hf")(tokens()[:1]).logits
    assert torch.equal(logits, torch.zeros(1, NEW_CLASSES))
