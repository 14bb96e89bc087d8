"""
The harness: a model beside a baseline on a suite of measurements, and what their difference is worth.

Reading order: `suites` (what is measured), `texts` (on what), `tasks` (how each metric is called and compared),
`statistics` (when a difference is one), `cache` (what is not measured twice), `runner` (the whole), `tables`,
`figures`, `overview` and `report` (what people look at), `standard_tasks` (the tasks of EleutherAI's `lm-eval`).
"""
