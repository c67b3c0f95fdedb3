"""What runs between a user's loop and a graph.

A call of a transformed block goes through

    block.BlockRuntime      makes a `call.BlockCall`
    generation.Generation   says what the call is: dense, passed, capturing or pruned
    store.Store             finds the program that holds for it, or makes it
    program.Program         reads the inputs, has an executor run the graph, writes the state
"""
