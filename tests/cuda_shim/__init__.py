"""The CUDA sources compiled as C++, so that their kernels run on the CPU. See cuda_runtime.h for what is checked.

native = build.load()  # the extension with its CUDA part, as the module _native_shim; CPU tensors stand in
shim = controls.Shim(native.__file__)
shim.reset()
shim.set_devices(count=2)
shim.set_order(blocks="descending", threads="shuffled", seed=1)
shim.fail(719, nth=2)  # the second launch from now returns cudaErrorLaunchFailure
stream = shim.stream(device=1)
with shim.capture(stream) as graph:  # what is enqueued on the stream is kept, with its arguments
    ...
graph.replay()
shim.launches()  # kernel, grid, stream, device, captured
shim.calls("cudaStreamSynchronize"), shim.allocations(device=0), shim.fault()
"""
