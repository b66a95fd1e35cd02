"""Growth schedules: each a function from a depth and a number of steps to stages.

A schedule is called as `schedule(depth, steps, **options)` and returns a list of Growth: one entry a stage, the last of
`depth` layers, `steps` in all. Its keyword-only parameters are the options that a recipe may write; their annotations
are what the values are checked by. ValueError says what is wrong, first the name of the option. A recipe names a
schedule of SCHEDULES, an entry point of the group `mslt.schedules`, or `module:function`.
"""

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from mslt.errors import MsltError
from mslt.validation import Frozen, NonNegativeInt, PositiveInt, mistakes

Freeze = Literal["none", "below", "embeddings"]
Source = NonNegativeInt | Literal["random"]
Sources = tuple[Source, ...]
Share = Annotated[float, Field(gt=0, lt=1)]
Weights = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=2)]


class Growth(Frozen):
    """What a schedule decides about one stage; the rest is the same for all of them.

    `sources` has one entry for each layer: the index of the layer of the stage before that it copies, or `random`.
    `freeze` says what does not train: `none`; `below`, the embeddings and every layer under the first that is new or
    moved; or the `embeddings` alone. Pooler and heads always train.
    """

    sources: Sources
    steps: PositiveInt
    freeze: Freeze = "none"


Schedule = Callable[..., list[Growth]]
RETRAIN_SHARE = 0.2  # Yang et al. 2020, section 4
DOUBLING_SHARES = (50, 70, 280)  # Gong et al. 2019: thousands of steps at 3, 6 and 12 layers


def full(depth: int, steps: int) -> list[Growth]:
    """All layers, all parameters, from the first step to the last: the ordinary way, and the baseline."""
    return [Growth(sources=random_layers(depth), steps=steps)]


def mslt(
    depth: int,
    steps: int,
    *,
    k: PositiveInt,
    retrain_share: Share = RETRAIN_SHARE,
    freeze: Freeze = "below",
    new_layers: Literal["copy", "random"] = "copy",
) -> list[Growth]:
    """Multi-stage layerwise training (Yang et al. 2020, arXiv:2011.13635, section 3).

    Stage 1 trains depth/k layers and everything else. Each of the next k-1 stages puts depth/k layers on top, copies of
    the top ones, and trains them with the heads (`the output layer`), all below frozen. The last stage retrains
    everything for `retrain_share` of the steps; the others share the rest alike.
    """
    if depth % k:
        divisors = ", ".join(str(divisor) for divisor in range(1, depth + 1) if depth % divisor == 0)
        raise ValueError(f"k: {k} does not divide model.num_hidden_layers {depth}; take one of {divisors}")
    retrain_steps = round(steps * retrain_share)
    if not 1 <= retrain_steps <= steps - k:
        raise ValueError(
            f"steps: {steps} steps with retrain_share {retrain_share} are {retrain_steps} to retrain and "
            f"{steps - retrain_steps} for {k} growing stages; each needs one at least"
        )
    block = depth // k
    shared, rest = divmod(steps - retrain_steps, k)
    stages = [Growth(sources=random_layers(block), steps=shared + (rest > 0))]
    for index in range(1, k):
        below = block * index
        top = tuple(range(below - block, below)) if new_layers == "copy" else random_layers(block)
        stages.append(Growth(sources=(*range(below), *top), steps=shared + (index < rest), freeze=freeze))
    return [*stages, Growth(sources=tuple(range(depth)), steps=retrain_steps)]


def stacking(depth: int, steps: int, *, shares: Weights = DOUBLING_SHARES, freeze: Freeze = "none") -> list[Growth]:
    """Progressive stacking (Gong et al. 2019, "Efficient training of BERT by progressively stacking", section 4).

    Each stage puts a copy of the whole stack on top of itself, and everything trains. `shares` is how the steps are
    divided among the stages, and so how often the depth doubles; the default is theirs: 3, 6, 12 layers.
    """
    return _doubling(depth, steps, shares, freeze, lambda index, before: index % before)


def interleave(depth: int, steps: int, *, shares: Weights = DOUBLING_SHARES, freeze: Freeze = "none") -> list[Growth]:
    """Each layer's copy next to it (Chang et al. 2018, arXiv:1710.10348, for residual networks): 0,0,1,1,2,2."""
    return _doubling(depth, steps, shares, freeze, lambda index, before: index // 2)


def _doubling(
    depth: int, steps: int, shares: tuple[float, ...], freeze: Freeze, source: Callable[[int, int], int]
) -> list[Growth]:
    times = 2 ** (len(shares) - 1)
    if depth % times:
        raise ValueError(
            f"shares: {len(shares)} stages double the depth {len(shares) - 1} times, and {times} does not divide "
            f"model.num_hidden_layers {depth}"
        )
    stages: list[Growth] = []
    for index, stage_steps in enumerate(split_steps(steps, shares)):
        stage_depth = depth // times * 2**index
        if index == 0:
            stages.append(Growth(sources=random_layers(stage_depth), steps=stage_steps))
        else:
            copied = tuple(source(layer, stage_depth // 2) for layer in range(stage_depth))
            stages.append(Growth(sources=copied, steps=stage_steps, freeze=freeze))
    return stages


def one_shot(
    depth: int,
    steps: int,
    *,
    start_depth: PositiveInt = 1,
    shallow_share: Share = 0.8,
    new_layers: Literal["copy", "random"] = "copy",
    freeze: Freeze = "none",
) -> list[Growth]:
    """Train shallow, grow once, late (Bu et al. 2025, arXiv:2511.04981; G_stack: Du et al. 2024, arXiv:2405.15319).

    `start_depth` layers train for `shallow_share` of the steps; then their copies, the whole stack over and over (the
    last time only as far as it fits), or new layers come on top, and everything trains. Bu et al. grow 1 layer at 0.8
    of the steps and keep the rate at its peak until then (optimizer.decay_share 0.1); Du et al. a quarter, earlier.
    """
    if start_depth >= depth:
        raise ValueError(f"start_depth: {start_depth} is not below model.num_hidden_layers {depth}")
    shallow, deep = split_steps(steps, (shallow_share, 1 - shallow_share))
    more = range(start_depth, depth)
    top = tuple(index % start_depth for index in more) if new_layers == "copy" else random_layers(len(more))
    return [
        Growth(sources=random_layers(start_depth), steps=shallow),
        Growth(sources=(*range(start_depth), *top), steps=deep, freeze=freeze),
    ]


class ListedStage(Frozen):
    """A stage as a recipe writes it; `sources` as for `mslt grow`: 0-5,0-5 or 0-2,random."""

    sources: str
    share: Annotated[float, Field(gt=0)]
    freeze: Freeze = "none"


def listed(depth: int, steps: int, *, stages: Annotated[tuple[ListedStage, ...], Field(min_length=1)]) -> list[Growth]:
    """The stages that the recipe lists; `share` is relative to the sum of all shares."""
    split = split_steps(steps, tuple(stage.share for stage in stages))
    return [
        Growth(sources=parse_sources(stage.sources), steps=stage_steps, freeze=stage.freeze)
        for stage, stage_steps in zip(stages, split, strict=True)
    ]


def random_layers(count: int) -> Sources:
    layer: Source = "random"
    return (layer,) * count


def parse_sources(text: str) -> Sources:
    """`0-5,0-5` or `0,1,random`: ranges include both ends."""
    sources: list[Source] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if part.strip() == "random":
            sources.append("random")
        elif first.isdecimal() and (not dash or (last.isdecimal() and int(last) >= int(first))):
            sources.extend(range(int(first), int(last or first) + 1))
        else:
            raise MsltError(f"sources {text!r}: {part.strip()!r} is no layer; write like 0-5,0-5 or 0,1,random")
    return tuple(sources)


def copied_upwards(depth: int, source: int, targets: Sources) -> Sources:
    """All layers, those in `targets` copies of layer `source`; a target may follow the top layer. MsltError for layers
    that are not there."""
    _refuse_absent(depth, "--copy", (source,))
    sources: list[Source] = list(range(depth))
    for target in targets:
        if target == "random" or target > len(sources):
            raise MsltError(
                f"--to {target}: copies go onto layers 0 to {depth - 1}, or right above them; name such layers"
            )
        sources[target : target + 1] = [source]
    return tuple(sources)


def without_top(depth: int, count: int) -> Sources:
    """MsltError where no layer, or all of them, would go."""
    if not 1 <= count < depth:
        gone = "would drop all layers" if count >= depth else "drops nothing"
        raise MsltError(f"--drop-top {count}: {gone} of {depth}; give 1 to {depth - 1}")
    return tuple(range(depth - count))


def kept_layers(depth: int, kept: Sources) -> Sources:
    """MsltError for layers that are not there, or not each once and in their order."""
    _refuse_absent(depth, "--keep", kept)
    if list(kept) != sorted(set(kept)):
        raise MsltError(f"--keep {','.join(map(str, kept))}: name each layer once, in order; --sources takes any order")
    return kept


def _refuse_absent(depth: int, option: str, layers: Sources) -> None:
    absent = [layer for layer in layers if layer == "random" or layer >= depth]
    if absent:
        raise MsltError(f"{option} {', '.join(map(str, absent))}: the model has layers 0 to {depth - 1} only; name "
                        "some of these")  # fmt: skip


def split_steps(steps: int, shares: tuple[float, ...]) -> list[int]:
    """`steps` divided as `shares` are to each other, to whole steps that add up."""
    total = sum(shares)
    borders = [round(steps * sum(shares[:count]) / total) for count in range(len(shares) + 1)]
    return [after - before for before, after in pairwise(borders)]


SCHEDULES: dict[str, Schedule] = {
    "full": full,
    "mslt": mslt,
    "stacking": stacking,
    "one_shot": one_shot,
    "interleave": interleave,
    "stages": listed,
}


def find_schedule(name: str) -> Schedule:
    """The schedule of that name; ValueError where there is none."""
    if name in SCHEDULES:
        return SCHEDULES[name]
    offered = entry_points(group="mslt.schedules")
    module, colon, function = name.partition(":")
    try:
        if name in offered.names:
            found = offered[name].load()
        elif module and colon:
            found = getattr(importlib.import_module(module), function)
        else:
            known = ", ".join([*SCHEDULES, *sorted(offered.names)])
            raise ValueError(f"name: {name!r} is none of {known}; or write module:function")
    except (ImportError, AttributeError, SyntaxError, NameError, TypeError) as error:
        raise ValueError(f"name: {name!r} cannot be loaded ({error}); is its folder on PYTHONPATH?") from None
    try:
        if inspect.isfunction(found) and _is_schedule(found):
            _options_model(found)
            return found
    except (NameError, PydanticUserError) as error:
        raise ValueError(f"name: an annotation of {name!r} cannot be used ({error})") from None
    raise ValueError(f"name: {name!r} is no function (depth, steps, *, options with annotations)")


def _is_schedule(function: Callable[..., Any]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    annotated = all(p.annotation is not inspect.Parameter.empty for p in _option_parameters(function))
    return kinds[:2] == [positional] * 2 and set(kinds[2:]) <= {keyword} and annotated


def _option_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function, eval_str=True).parameters.values())[2:]


def option_mistakes(schedule: Schedule, options: dict[str, Any]) -> list[str]:
    """A line for each option that is unknown, missing, or of the wrong kind."""
    return mistakes(_options_model(schedule), options)


def stages_of(schedule: Schedule, depth: int, steps: int, options: dict[str, Any]) -> list[Growth]:
    """The stages of a schedule, checked: depths that follow from each other, steps that add up.

    ValueError for what does not fit, in words for whoever wrote the options, or the schedule.
    """
    checked = _options_model(schedule).model_validate(options)
    try:
        stages = list(schedule(depth, steps, **{name: getattr(checked, name) for name in type(checked).model_fields}))
    except ValidationError as error:  # of a Growth
        where, message = error.errors()[0]["loc"], error.errors()[0]["msg"]
        if where == ("steps",) and error.errors()[0]["type"] == "greater_than":
            raise ValueError(f"steps: {steps} are too few for these options: a stage would have none") from None
        raise ValueError(f"name: a stage's {'.'.join(map(str, where))} is wrong: {message}") from None
    except MsltError as error:
        raise ValueError(str(error)) from None
    except (TypeError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(f"name: the schedule failed on {depth} layers and {steps} steps: {error!r}") from error
    if not stages or not all(isinstance(stage, Growth) for stage in stages):
        raise ValueError("name: the schedule returned no list of mslt.growth.Growth")
    before = 0
    for number, stage in enumerate(stages, 1):
        if not stage.sources:
            raise ValueError(f"name: stage {number} has no layer")
        missing = [source for source in stage.sources if source != "random" and source >= before]
        if missing:
            raise ValueError(f"name: stage {number} copies layers {missing}, and {before} came before")
        before = len(stage.sources)
    if before != depth:
        raise ValueError(f"name: the last stage has {before} layers, model.num_hidden_layers is {depth}")
    if sum(stage.steps for stage in stages) != steps:
        raise ValueError(f"name: the stages have {sum(stage.steps for stage in stages)} steps, and not {steps}")
    if stages[0].freeze != "none":
        raise ValueError(f"freeze: the first stage is new and cannot freeze ({stages[0].freeze}); write none")
    return stages


def _options_model(schedule: Schedule) -> type[Frozen]:
    required = inspect.Parameter.empty
    parameters = _option_parameters(schedule)
    fields: Any = {p.name: (p.annotation, ... if p.default is required else p.default) for p in parameters}
    return create_model(f"Options of {schedule.__name__}", __base__=Frozen, **fields)
