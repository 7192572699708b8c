# SPDX-License-Identifier: Apache-2.0
"""From files and datasets to batches: sources -> formats -> templates -> rows -> batches.

sources.load_rows    files, folders, datasets -> plain dict rows, each with its place
formats.read         rows of some layout -> examples of a few kinds
templates            chats -> text, and which part of it is whose
encode               examples -> token rows with the mask of what is trained
batches              rows -> `batch_at(step)`, a pure function of (seed, step)
"""
