"""Reading and writing clips (videos, animations, folders of frames): read as streams, written atomically."""
