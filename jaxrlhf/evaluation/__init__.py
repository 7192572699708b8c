# SPDX-License-Identifier: Apache-2.0
"""Evidence that a model got better: metrics, intervals, calibration, Goodhart curves, alarms.

Everything here is NumPy on the host: numbers come in, numbers go out, no model is loaded. What a
stage finds out is one `results.EvalResult`, written as `eval.json` and read back by the report.
"""
