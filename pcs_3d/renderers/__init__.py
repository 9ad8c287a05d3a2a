"""From a field and cameras to pictures. A new renderer is one file and one line in the union."""
