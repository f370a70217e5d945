"""Train whatever a config asks for."""

from __future__ import annotations

from collections.abc import Callable

from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.resolve import ResolvedRun, resolve


def train(config: TrainingConfig, *, say: Callable[[str], None] = print) -> dict[str, float]:
    """Train a model as a config says; every process of the layout calls it.

    With a section ``classification`` a classifier is fine-tuned: see
    :func:`megatron_olmo_bridge.tasks.classification.train.train`.

    Args:
        config: as a recipe returns it.
        say: receives what people read, line by line, in the first process.

    Returns:
        Figures of the last step: ``step``, ``tokens``, ``train_loss``, ``validation_loss``.

    Raises:
        TrainingStopped: before the last step; the message says why.
        BridgeError: an impossible config, or something that it names is missing or damaged.
    """
    if config.classification is not None:
        from .classification.train import train as train_classifier

        return train_classifier(config, say)
    from .language_modelling import train as train_language_model

    return train_language_model(config, say)


def resolve_run(config: TrainingConfig, processes: int) -> ResolvedRun:
    """Resolve a config as :func:`train` does, without opening tokens or tokenizers.

    Raises:
        BridgeError: as :func:`train`.
    """
    if config.classification is not None and config.classification.train:
        from .classification.data import load_examples
        from .classification.train import with_head

        train, _ = load_examples(config.classification)
        return resolve(*with_head(config, train.classes), processes)
    from .language_modelling import with_model

    return resolve(*with_model(config), processes)
