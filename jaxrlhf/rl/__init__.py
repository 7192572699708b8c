# SPDX-License-Identifier: Apache-2.0
"""From prompts to what a policy update needs: one file an arrow, each a pure function.

prompts -> rollout.py -> Rollout -> score.py -> scores, log-probs, values -> experience.py
"""
