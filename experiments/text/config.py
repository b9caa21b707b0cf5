"""The configurations of the runs, complete and checked, from the options that are given."""

import dataclasses

from text.options import Config, Model
from text.presets import CORPORA, PAPER, smallest
from training.flags import check, check_read, without_unread
from training.options import check_names, filled


def choose(config: Config) -> list[Config]:
    """The runs that are asked for, each with everything filled in; what does not fit is refused."""
    models: list[Model] = ["reversible", "explicit"] if config.model is None else [config.model]
    each = [without_unread(dataclasses.replace(config, model=model)) for model in models]
    runs = [_resolve(run, alone=len(each) == 1) for run in each]
    check_read(config, runs)
    check_names(runs)
    return runs


def _resolve(config: Config, alone: bool) -> Config:
    """Fills in what was left at None; `alone`: no other run shares its name."""
    preset = (PAPER if config.preset == "paper" else CORPORA)[config.corpus]
    if config.smoke:
        config = dataclasses.replace(config, sample=min(config.sample, 8), log_every=2)
        preset = smallest(preset)
    values = dataclasses.asdict(preset)
    if config.steps is not None or config.epochs is not None:
        values |= {"epochs": config.epochs, "steps": config.steps}
    named = f"{config.corpus}{f'-{config.preset}' if config.preset else ''}-{config.model}"
    default = f"{named}-{config.seed}{'-smoke' if config.smoke else ''}"
    name = default if config.name is None else config.name
    if config.name is not None and not alone:  # one prefix for two folders
        name = f"{config.name}-{default}"
    config = filled(dataclasses.replace(config, name=name), values)
    check(config)
    if config.retention == "learned" and not 0 < config.beta < 1:
        raise SystemExit(
            f"Expected --beta between 0 and 1 beside --retention learned, which starts there and "
            f"stays between these, got {config.beta}. Pass another, or leave it out."
        )
    if config.last is not None and config.last > (config.max_steps or 1):
        raise SystemExit(
            f"Expected --last of at most the {config.max_steps} --max-steps, got {config.last}. "
            f"Pass fewer, or leave it out for all."
        )
    if (config.epochs is None) == (config.steps is None):
        raise SystemExit(
            f"Expected either --epochs or --steps, got {config.epochs} and {config.steps}. Leave "
            f"one of them out."
        )
    return config


def title(config: Config) -> str:
    if config.model == "reversible":
        words = [f"RevDEQ, {config.max_steps} steps"]
        words += ["retention learned"] if config.retention == "learned" else []
        words += ["random depth"] if config.random_depth else []
        return ", ".join(words + ([f"last {config.last}"] if config.last else []))
    return (
        "explicit, 1 block"
        if config.model == "explicit"
        else f"explicit, {config.max_steps} blocks"
    )
