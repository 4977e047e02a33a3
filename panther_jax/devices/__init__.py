"""The devices and processes of a run: mesh, memory, compiler."""
