"""The personalization core, which never imports a `pcs_` package."""
