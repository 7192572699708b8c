# SPDX-License-Identifier: Apache-2.0
"""Whether rows fit the positions that a model has, said before anything is computed.

Beyond the last learned position there is no embedding: the row would be NaN.
"""

from jaxrlhf.data.encode import PairSet, RowSet
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.adapters.virtual import virtual_tokens
from jaxrlhf.sampling.batches import longest_prompt
from jaxrlhf.stages.models import Model


def check_rows(rows: RowSet | PairSet, model: Model, key: str = "data.max_length") -> None:
    """Refuses rows longer than the table of learned positions.

    Raises:
        ConfigError: naming the longest row, and the setting `key` that bounds them.
    """
    if model.config.position != "learned":
        return
    limit = model.config.max_positions - virtual_tokens(model.params)
    longest = int(rows.lengths.argmax())
    if (length := int(rows.lengths[longest])) > limit:
        place = (rows.chosen if isinstance(rows, PairSet) else rows).origins[longest]
        raise ConfigError(
            f"{key}: the longest row, {place}, has {length} tokens; the model has {limit} "
            f"positions for it, which are learned: set {key} to {limit} or less"
        )


def check_sampling(model: Model, longest: int, new_tokens: int) -> None:
    """Refuses prompts of up to `longest` tokens that leave no room for `new_tokens` more.

    Raises:
        ConfigError: naming the settings that bound both.
    """
    most = longest_prompt(model.config, model.params, new_tokens)
    if most is None or longest <= most:
        return
    limit = most + new_tokens
    room = limit - longest
    mend = f"set it to {room} or less" if room > 0 else "shorten the prompts (max_prompt_length)"
    raise ConfigError(
        f"sampling.max_new_tokens = {new_tokens} after a prompt of {longest} tokens exceeds the "
        f"{limit} positions in which the model can sample: {mend}"
    )
