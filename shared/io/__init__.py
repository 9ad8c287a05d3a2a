"""Pictures, captions, masks and files: in and out, safely."""
