"""Where state is kept so that it survives: journal, manifest chain, artifacts, fences.

    journal  fences        chain  blobs
       └────┬────┘           └──┬──┘
            │              objects (directory or fsspec URL)
            └───────┬───────────┘
                  disk (real, or faulty for the simulator)

Everything here is synchronous; roles call it through `runtime.run_blocking`.
"""
