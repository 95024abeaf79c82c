"""Made by `extract_selectors.py` from pyobjc-framework-Metal 12.2.2; facts about its interface."""

from __future__ import annotations

METHODS: dict[str, tuple[str, ...]] = {
    "GPUEndTime": ("d",),
    "GPUStartTime": ("d",),
    "commandBuffer": ("@",),
    "commit": ("v",),
    "computeCommandEncoder": ("@",),
    "dispatchThreadgroups:threadsPerThreadgroup:": ("v", "{MTLSize=QQQ}", "{MTLSize=QQQ}"),
    "endEncoding": ("v",),
    "error": ("@",),
    "hasUnifiedMemory": ("Z",),
    "maxBufferLength": ("Q",),
    "maxThreadgroupMemoryLength": ("Q",),
    "maxTotalThreadsPerThreadgroup": ("Q",),
    "name": ("@",),
    "newBufferWithBytesNoCopy:length:options:deallocator:": ("@", "^v", "Q", "Q", "@?"),
    "newCommandQueue": ("@",),
    "newComputePipelineStateWithFunction:error:": ("@", "@", "o^@"),
    "newFunctionWithName:": ("@", "@"),
    "newLibraryWithSource:options:error:": ("@", "@", "@", "o^@"),
    "setBuffer:offset:atIndex:": ("v", "@", "Q", "Q"),
    "setBytes:length:atIndex:": ("v", "^v", "Q", "Q"),
    "setComputePipelineState:": ("v", "@"),
    "setFastMathEnabled:": ("v", "Z"),
    "setMathMode:": ("v", "q"),
    "setThreadgroupMemoryLength:atIndex:": ("v", "Q", "Q"),
    "status": ("q",),
    "threadExecutionWidth": ("Q",),
    "waitUntilCompleted": ("v",),
}

CONSTANTS: dict[str, int] = {
    "MTLCommandBufferStatusCompleted": 4,
    "MTLCommandBufferStatusError": 5,
    "MTLMathModeSafe": 0,
    "MTLResourceStorageModeShared": 0,
}

FUNCTIONS = ("MTLCreateSystemDefaultDevice", "MTLSizeMake")
