// Compiled twice, linked before and after the .cu files: the edges of what they declare __shared__.
extern "C" {
__attribute__((visibility("hidden"))) __thread char NEXUS_SHIM_EDGE[16];
}
