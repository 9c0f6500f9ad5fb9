"""Every format that is read and written: jobs, policy files; the only YAML."""
