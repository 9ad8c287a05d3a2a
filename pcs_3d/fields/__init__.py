"""What is optimised: representations of a thing in space. A new one is one file and one line in the union."""
