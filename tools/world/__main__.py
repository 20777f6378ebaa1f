from tools.world.command import main

main()
