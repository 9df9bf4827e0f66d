"""The controller: one loop, where its processes are placed, and how long it waits for each."""
