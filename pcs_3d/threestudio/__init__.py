"""An extension for threestudio (https://github.com/threestudio-project/threestudio) that combines its systems, geometries and
YAML with this package's concepts, guidance, rendering and export."""
