"""An extension for threestudio (https://github.com/threestudio-project/threestudio): its systems, geometries and YAML with
concepts, guidance, rendering and export of this package."""
