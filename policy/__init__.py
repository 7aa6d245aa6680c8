"""What is learned, and what it is measured with: simulator, baselines, exact optima; training and the runtime.

In which order to read it: docs/policy.md, "Reading the code".
"""
