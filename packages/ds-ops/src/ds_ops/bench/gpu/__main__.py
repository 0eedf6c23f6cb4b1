from ds_ops.bench.gpu.measuring import main

main()
