"""Who wrote which statistic, and when: a model watched while it trains."""
