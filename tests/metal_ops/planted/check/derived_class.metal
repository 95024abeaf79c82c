// says: Metal has no derived classes
#include <metal_stdlib>
struct Base { uint n; };
struct Derived : Base {  // here
    uint m;
};
kernel void k(device uint* y [[buffer(0)]]) {
    Derived d;
    d.n = 1;
    y[0] = d.n;
}
