"""What is optimised: representations of a thing in space."""
