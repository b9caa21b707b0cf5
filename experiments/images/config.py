"""The configurations of the runs, complete and checked, from the options that are given."""

import dataclasses

from images.options import CONCAVE, EXPLICIT, Config, kind_of
from images.presets import PRESETS, changes, family, smallest
from training.flags import check, check_read, without_unread
from training.options import check_names, filled


def choose(config: Config) -> list[Config]:
    """The runs that are asked for, each with everything filled in; what does not fit is refused."""
    named = Config(dataset="digits") if config.preset is None else PRESETS[config.preset]
    options = filled(config, {"dataset": named.dataset, "model": named.model})
    runs = [options]
    if options.model is None:
        asked = options.kind or kind_of(options.activation)
        kinds = (1, 2) if asked is None else (asked,)
        concave = [dataclasses.replace(options, model="pc-linear", kind=kind) for kind in kinds]
        first, last = (dataclasses.replace(options, model=m) for m in ("implicit-resnet", "resnet"))
        runs = [first, *concave, last]
    runs = [_resolve(without_unread(run)) for run in runs]
    if options.model is None and config.name is not None:  # one prefix for all folders
        prefixed = lambda run: f"{config.name}-{default_name(run)}"
        runs = [dataclasses.replace(run, name=prefixed(run)) for run in runs]
    check_read(config, runs)
    check_names(runs)
    return runs


def _resolve(config: Config) -> Config:
    """Fills in what was left at None: the named preset first, then the family's."""
    model, dataset = config.model, config.dataset
    assert model is not None and dataset is not None
    values = dataclasses.asdict(family(model, dataset))
    if config.preset is not None:
        # With another network or data set than the preset's, the values of its family stay.
        values |= changes(PRESETS[config.preset])
    # A kind needs an activation of its own, unless the preset's is of that kind.
    if config.kind is not None and kind_of(values["activation"]) != config.kind:
        values["activation"] = "tanh" if config.kind == 1 else "sigmoid"
    if config.smoke:
        config = filled(smallest(config), {"epochs": 2})
    config = filled(config, values)
    config = filled(config, {"kind": kind_of(config.activation)})
    config = filled(config, {"name": default_name(config)})
    check(config)
    if kind_of(config.activation) != config.kind:
        raise SystemExit(
            f"Expected an activation of kind {config.kind} for {model}, got {config.activation}. "
            f"Choose a --model with --kind {kind_of(config.activation)}, or leave --activation out."
        )
    scales = len(config.features or ())
    if model not in CONCAVE and len(config.widths or ()) != scales:
        raise SystemExit(
            f"Expected as many --widths as --features for {model}, one per scale; got "
            f"{config.widths} and {config.features}. Give both."
        )
    if model in ("pc-linear", "pc-single") and scales != 1:
        raise SystemExit(
            f"Expected one number of --features for {model}, which has one solve, got "
            f"{config.features}. Leave one, or choose --model pc-multi."
        )
    return config


def default_name(config: Config) -> str:
    kind = f"-kind{config.kind}" if config.model in CONCAVE else ""
    named = config.preset or f"{config.dataset}-{config.model}{kind}"
    return f"{named}-{config.seed}{'-smoke' if config.smoke else ''}"


def title(config: Config) -> str:
    if config.model in CONCAVE:
        return f"pcDEQ-{config.kind} ({config.model}, {config.activation})"
    return f"explicit {config.model}" if config.model in EXPLICIT else f"RevDEQ ({config.model})"
