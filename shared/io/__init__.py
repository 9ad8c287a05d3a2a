"""Safe reading and writing of pictures, captions, masks and other files."""
