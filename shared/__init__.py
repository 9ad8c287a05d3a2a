"""The personalization core. It never imports a `pcs_` package."""
