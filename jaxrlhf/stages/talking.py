# SPDX-License-Identifier: Apache-2.0
"""What chats make of a model: it ends a text where their template ends a turn, and keeps it."""

import copy
import dataclasses
from collections.abc import Sequence

from jaxrlhf.data.templates import Template, stop_ids
from jaxrlhf.stages.models import Model


def talking(model: Model, templates: Sequence[Template]) -> Model:
    """A model that is trained on, or asked for, replies in chats.

    The ends of a turn are among the tokens that end its texts, and a tokenizer without a chat
    template has that of the chats: whatever is done with the model later need not be told.

    Args:
        templates: those that rendered the chats; none where there are only texts, which leaves the
            model as it is. Of several none can stand for the others in the tokenizer.
    """
    ends = list(model.stop_ids)
    for template in templates:
        ends += [i for i in stop_ids(model.tokenizer, template) if i not in ends]
    hf, tokenizer = model.hf_config, model.tokenizer
    if len(ends) > len(model.stop_ids):
        hf = {**hf, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    if len(templates) == 1 and not tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)  # other models may share this one
        tokenizer.chat_template = templates[0].source
    return dataclasses.replace(model, hf_config=hf, tokenizer=tokenizer)
