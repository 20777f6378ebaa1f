from tools.world.build import main

main()
