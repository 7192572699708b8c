# SPDX-License-Identifier: Apache-2.0
"""An embedded world for learning and testing: a small customer-support language from a seed.

Customers write, demonstrators of varied skill answer, labelers with biases rank, and a gold scorer
knows the truth. Because labelers are biased, a reward model fitted to their rankings is a proxy:
optimised a little it improves the replies, optimised hard it fills them with flattery and gifts
while gold falls. Nothing is downloaded; `World(seed).write(folder)` writes all files.
"""

from jaxrlhf.data.synthetic.gold import GoldScore, gold_helpful, gold_polite, gold_reward, score
from jaxrlhf.data.synthetic.language import Request, read_prompt, read_reply
from jaxrlhf.data.synthetic.people import DEMONSTRATORS, LABELERS, Demonstrator, Labeler
from jaxrlhf.data.synthetic.tokenizer import build_tokenizer, save_tokenizer
from jaxrlhf.data.synthetic.world import Prompt, World, label_rankings

__all__ = [
    "DEMONSTRATORS",
    "LABELERS",
    "Demonstrator",
    "GoldScore",
    "Labeler",
    "Prompt",
    "Request",
    "World",
    "build_tokenizer",
    "gold_helpful",
    "gold_polite",
    "gold_reward",
    "label_rankings",
    "read_prompt",
    "read_reply",
    "save_tokenizer",
    "score",
]
