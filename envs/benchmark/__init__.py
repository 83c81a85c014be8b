"""A benchmark of ways to set hyperparameters: many domains, model families and tuning budgets, one record of trials."""
