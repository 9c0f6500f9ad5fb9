"""Strategies, one file each: closed-form policies, the control arms."""
