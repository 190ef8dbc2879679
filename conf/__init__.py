"""The only registry: which class plays which part. One folder per group, one YAML per choice; `pkg://conf` for Hydra."""
