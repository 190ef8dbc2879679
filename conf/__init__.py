"""The only registry: which class plays which part. One folder per group, one YAML per choice (Hydra's `pkg://conf`)."""
