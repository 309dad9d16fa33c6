// Panels for AVX-512 with VNNI.
#include "kernels/avx512vnni/panel_vectors.h"

namespace nomatmul {

const PanelKernels kAvx512VnniPanels = {PanelVectors::kInt8Bias, prepare_tile,
                                        Panels<PanelVectors>::scratch_bytes,
                                        Panels<PanelVectors>::product, float_product<PanelVectors>};

}  // namespace nomatmul
