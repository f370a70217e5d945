"""Train a language model or a classifier, depending on the config."""

from __future__ import annotations

from collections.abc import Callable

from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.resolve import ResolvedRun, resolve


def train(config: TrainingConfig, *, say: Callable[[str], None] = print) -> dict[str, float]:
    """Train a model from a config; every process of the layout calls it.

    If the config has a section ``classification``, fine-tune a classifier: see
    :func:`megatron_olmo_bridge.tasks.classification.train.train`.

    Args:
        config: as a recipe returns it.
        say: prints a line for people; called in the first process.

    Returns:
        Figures of the last step: ``step``, ``tokens``, ``train_loss``, ``validation_loss``.

    Raises:
        TrainingStopped: training ended before the last step; the message says why.
        BridgeError: the config is invalid, or a file that it names is missing or damaged.
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
