"""One training loop for every task; tasks reach it through `training.objective.Objective`."""
