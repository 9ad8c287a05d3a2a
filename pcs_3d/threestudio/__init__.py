"""An extension for threestudio (https://github.com/threestudio-project/threestudio). It combines threestudio's systems,
geometries and YAML files with this package's concepts, guidance, rendering and export."""
